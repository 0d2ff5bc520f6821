"""Batches of a bridge within `data.max_tokens`: the lengths of rows, their padding, and the mean over ranks."""

from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional as F

from callbacks.throughput import Throughput
from datamodules import WordProblems
from lightning_modules.core.token_weight import token_weight
from lightning_modules.telepathy import PerceiverBridge, TokenBridge
from lightning_modules.telepathy.layout import Packing

EVERYTHING = {"lm": 1.0, "autoencode": 0.1, "readback": 0.1, "kl_text": 0.1, "anchor": 0.1}
MOST = 700


def widths(batch) -> list[int]:
    """Return the padded lengths of all rows of a batch."""
    packings = [value for value in batch.values() if isinstance(value, Packing)]
    return [packing.tokens_BT.shape[1] for packing in packings] + [batch["source"].shape[1]]


@pytest.mark.parametrize(
    ("bridge", "options", "kinds"),
    [
        (TokenBridge, {}, 1),
        (TokenBridge, {"text_prefix": 2}, 2),
        (PerceiverBridge, {"objectives": EVERYTHING}, 4),
        (TokenBridge, {"objectives": EVERYTHING, "text_prefix": 90}, 5),
    ],
)
def test_the_length_of_a_problem_is_that_of_its_longest_row(telepathy, problems, bridge, options, kinds):
    module = telepathy(bridge, **options)
    alone = [module.collate([problem], True) for problem in problems]
    assert module.lengths(problems) == [max(widths(batch)) for batch in alone]
    assert [len(widths(batch)) for batch in alone] == [kinds + 1] * len(problems)
    assert len(set(module.lengths(problems))) > 3
    together = module.collate(problems, True)["soft"]
    real = sum(batch["soft"].tokens_BT.numel() for batch in alone)
    assert together.padding == together.tokens_BT.numel() - real > 0
    assert [batch["soft"].padding for batch in alone] == [0] * len(problems)


def test_rows_that_are_as_long_as_their_batch_have_no_length(telepathy, problems):
    module = telepathy(reproduce_flaws=["padding_labels"])
    with pytest.raises(ValueError, match=r"data.max_tokens: with the flaw padding_labels a row is as long as others"):
        module.lengths(problems)


def test_lengths_need_no_states_of_a_source_in_files(telepathy, problems, monkeypatch):
    module = telepathy()
    expected = module.lengths(problems)
    monkeypatch.setattr(module.source, "cache", object())  # without a method to read
    assert module.lengths(problems) == expected
    with pytest.raises(AttributeError, match="read"):
        module.source.tokenize([problem.question for problem in problems])


def loaders(module, world: int) -> list:
    made = []
    for rank in range(world):
        data = WordProblems(batch_size=64, max_tokens=MOST, epoch_size=200, validation_size=2, test_sets={"test": 2})
        data.trainer = SimpleNamespace(
            overfit_batches=0, limit_train_batches=1.0, global_rank=rank, world_size=world, lightning_module=module
        )
        data.setup("fit")
        made.append(data.train_dataloader())
    return made


def test_batches_vary_and_no_row_of_any_model_is_above_the_budget(telepathy):
    module = telepathy(objectives=EVERYTHING)
    batches = list(loaders(module, 1)[0])
    rows = [len(batch["source"]) for batch in batches]
    assert all(count * max(widths(batch)) <= MOST for count, batch in zip(rows, batches, strict=True))
    assert max(rows) > min(rows)
    assert sum(rows) == pytest.approx(200, rel=0.1)


class Ranks:
    """A module's view of two ranks, of which one has gathered the counts of both."""

    device = torch.device("cpu")
    _trainer = SimpleNamespace(world_size=2)

    def __init__(self, counts: list[int]):
        self.counts = torch.tensor(counts, dtype=torch.float32)

    def all_gather(self, count: torch.Tensor) -> torch.Tensor:
        assert count in self.counts
        return self.counts


@torch.no_grad()
def test_the_mean_of_the_ranks_is_the_mean_over_all_answer_tokens(telepathy):
    module, unequal = telepathy(), 0
    for batches in list(zip(*loaders(module, 2), strict=True))[:4]:
        logits, labels = [], []
        for batch in batches:
            logits.append(module.target.logits(batch["soft"], module(batch)))
            labels.append(batch["soft"].labels_N)
        counts = [len(labels_N) for labels_N in labels]
        unequal += counts[0] != counts[1]
        parts = zip(counts, logits, labels, strict=True)
        losses = [token_weight(Ranks(counts), count) * F.cross_entropy(*pair) for count, *pair in parts]
        whole = F.cross_entropy(torch.cat(logits), torch.cat(labels))
        torch.testing.assert_close(torch.stack(losses).mean(), whole)
        assert len({len(batch["source"]) for batch in batches}) == 1  # the rows of ranks are gathered
    assert unequal


def test_the_share_of_padding_is_that_of_the_batches(telepathy, fit):
    """It is that of the steps after the first, which the rates leave out."""
    module, seen = telepathy(), []
    collate = module.collate
    module.collate = lambda problems, training: seen.append(collate(problems, training)) or seen[-1]
    data = WordProblems(batch_size=64, max_tokens=MOST, epoch_size=200, validation_size=2, test_sets={"test": 2})
    trainer = fit(module, 4, data, callbacks=[Throughput(2)])
    packings = [batch["soft"] for batch in seen[1:4]]
    padding, tokens = (
        sum(values) for values in zip(*((p.padding, p.tokens_BT.numel()) for p in packings), strict=True)
    )
    assert trainer.callback_metrics["throughput/padding"].item() == pytest.approx(padding / tokens)
    assert 0 < padding / tokens < 0.15
