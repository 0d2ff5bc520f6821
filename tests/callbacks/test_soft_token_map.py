"""Soft tokens among the target's words: places and words of known vectors, files over training, no trace in it."""

import json
from functools import partial

import pytest
import torch
from conftest import QUIET, SMALL
from lightning import Trainer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from benchmarks.telepathy_pictures import tokens as picture
from callbacks import SoftTokenMap
from datamodules import WordProblems
from datamodules.errors import UserError
from datamodules.problems import generate
from lightning_modules.telepathy import KVBridge
from lightning_modules.telepathy.embedding_map import EmbeddingSpace, measures, placed

PROBLEMS = [generate(5, "validation", index) for index in range(3)]


@pytest.fixture(scope="module")
def target(telepathy):
    return telepathy().target


def of_words(target, factor: float):
    """Return a batch whose soft tokens are the embeddings of its questions' own tokens, times a factor."""
    rows = target.rows.question_tokens([problem.question for problem in PROBLEMS])
    soft_BKD = torch.zeros(3, max(map(len, rows)), target.width)
    mask_BK = torch.zeros(soft_BKD.shape[:2], dtype=torch.bool)
    for number, row in enumerate(rows):
        soft_BKD[number, : len(row)] = factor * target.embedding.weight[row].detach()
        mask_BK[number, : len(row)] = True
    return {"problems": PROBLEMS, "soft_mask": mask_BK}, soft_BKD, rows


@pytest.mark.parametrize("factor", [1.0, 7.0])
def test_embeddings_are_their_own_nearest_words(target, factor):
    batch, soft_BKD, rows = of_words(target, factor)
    questions = placed(EmbeddingSpace(target), batch, soft_BKD)
    assert ["".join(question.words) for question in questions] == [target.tokenizer.decode(row) for row in rows]
    assert [len(question.points) for question in questions] == [len(row) for row in rows]  # padding is left out
    found = measures(questions)
    assert found["nearest_cosine"] == pytest.approx(1, abs=1e-5)
    assert found["in_question"] == 1
    sizes = [target.embedding.weight[row].square().mean(-1).sqrt() for row in rows]
    assert found["size"] == pytest.approx(factor * torch.cat(sizes).mean().item() / target.scale(), rel=1e-4)


def test_words_of_another_question_are_not_in_the_question(target):
    batch, _, rows = of_words(target, 1.0)
    others = [target.embedding.weight[[token for token in range(512) if token not in row][:4]].detach() for row in rows]
    batch["soft_mask"] = torch.ones(3, 4, dtype=torch.bool)
    assert measures(placed(EmbeddingSpace(target), batch, torch.stack(others)))["in_question"] == 0


def test_places_are_the_principal_components_of_the_embeddings(target):
    space = EmbeddingSpace(target)
    vectors_VD = target.embedding.weight.detach()
    values = torch.linalg.svdvals(vectors_VD - vectors_VD.mean(0))
    torch.testing.assert_close(space.points_V2.norm(dim=0), values[:2], rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(space.place(vectors_VD[:5]), space.points_V2[:5])
    assert len(space.shown()) == 512


def test_snapshots_over_training_and_no_trace_in_it(telepathy, tmp_path):
    weights = []
    for number, callbacks in enumerate(([], [SoftTokenMap(n_samples=3, every_n_steps=2)])):
        module, folder = telepathy(), tmp_path / str(number)
        logger = TensorBoardLogger(folder, name="", version="")
        options = QUIET | {"logger": logger, "max_steps": 4, "val_check_interval": 2, "limit_val_batches": 1}
        trainer = Trainer(callbacks=callbacks, accelerator="cpu", check_val_every_n_epoch=None, **options)
        trainer.fit(module, datamodule=WordProblems(**SMALL))
        weights.append(torch.cat([p.detach().flatten() for p in module.bridge.parameters()]))
    assert torch.equal(*weights)
    files = sorted(folder.glob("soft_tokens/*.json"))
    assert [file.stem for file in files] == ["2", "4"]
    early, late = (json.loads(file.read_text()) for file in files)
    assert len(early["questions"]) == 3
    assert early["embeddings"] == late["embeddings"]
    assert early["questions"][0]["question"] == late["questions"][0]["question"]
    assert early["questions"][0]["points"] != late["questions"][0]["points"]
    assert trainer.callback_metrics["soft_token_map/size"].item() == pytest.approx(1, abs=0.2)
    events = EventAccumulator(str(folder), size_guidance={"images": 0}).Reload()
    assert "soft_token_map" in events.Tags()["images"]
    assert len(events.Scalars("soft_token_map/in_question")) == 2
    axes = picture(folder).axes
    assert [one.get_title() for one in axes] == ["step 2", "step 4"]
    assert len(axes[1].collections[1].get_offsets()) == len(late["questions"][0]["points"])
    assert 1 <= len(axes[1].texts) <= 6


def test_what_is_refused(telepathy):
    with pytest.raises(UserError, match="`n_samples` must be at least 1"):
        SoftTokenMap(0)
    trainer = Trainer(callbacks=SoftTokenMap(), accelerator="cpu", **QUIET)
    with pytest.raises(UserError, match="needs soft tokens, which BoringModel does not have"):
        trainer.validate(BoringModel(), verbose=False)
    module = telepathy(partial(KVBridge, reach=2), [1, 2], output="none")
    with pytest.raises(UserError, match="are keys and values"):
        SoftTokenMap().setup(Trainer(accelerator="cpu", **QUIET), module, "fit")
