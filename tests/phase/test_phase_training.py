"""Training of Phase: runs of a seed, scheduled sampling, and mixtures of texts."""

import math
from pathlib import Path

import pytest
import torch
from conftest import QUIET
from lightning import Callback, Trainer
from safetensors.torch import save_file

from callbacks import ActivationClamp
from datamodules import Mixture, StateTracking, TextCorpus
from datamodules.errors import UserError
from lightning_modules.phase import Phase
from lightning_modules.phase.sampling import mixed_tokens


def fit(folder: Path, *callbacks: Callback, seed: int = 0, steps: int = 4, more_tokens: int = 0, **options) -> Phase:
    data = TextCorpus(level="char", max_size=9000, seq_len=16, batch_size=4, validation_size=4, test_size=4, seed=seed)
    torch.manual_seed(seed)
    module = Phase(data.vocab_size + more_tokens, 16, 16, 2, warmup_steps=2, seed=seed, **options)
    quiet = QUIET | {"accelerator": "cpu", "limit_val_batches": 0, "max_steps": steps, "default_root_dir": folder}
    Trainer(**quiet, callbacks=list(callbacks)).fit(module, datamodule=data)
    return module


@pytest.mark.parametrize(
    "options", [{"dropout": 0.3}, {"residual_dropout": 0.3}, {"scheduled_sampling": 0.9}, {"pattern": "PGAL"}]
)
def test_two_runs_of_a_seed_are_equal_bit_for_bit(tmp_path, options):
    modules = *(fit(tmp_path, **{"pattern": "P"} | options) for _ in range(2)), fit(tmp_path, pattern="P")
    one, other, plain = (torch.cat([x.flatten() for x in module.network.parameters()]) for module in modules)
    assert torch.equal(one, other)
    assert one.shape != plain.shape or not torch.equal(one, plain)  # the option does something


def test_an_ensemble_with_scheduled_sampling_has_the_losses_of_separate_runs(tmp_path):
    together = fit(tmp_path, seed=3, pattern="P", scheduled_sampling=0.9, ensemble=2)
    for member in range(2):
        alone = fit(tmp_path, seed=3 + member, pattern="P", scheduled_sampling=0.9)
        torch.testing.assert_close(together.members["train/loss"][member], alone.members["train/loss"][0])


@pytest.mark.parametrize("ensemble", [1, 2])
def test_a_clamp_by_class_knows_the_labels_while_the_model_samples(tmp_path, ensemble):
    save_file({"network.final_residual.spread.target": torch.tensor(1.0)}, tmp_path / "reference.safetensors")
    clamp = ActivationClamp("final_residual", "mean_preserving", str(tmp_path / "reference.safetensors"))
    module = fit(tmp_path, clamp, pattern="P", scheduled_sampling=0.9, ensemble=ensemble)
    assert module.members["train/loss"].isfinite().all()


def test_scheduled_sampling_needs_the_last_step(tmp_path):
    with pytest.raises(UserError, match=r"trainer\.max_steps must be set: model\.scheduled_sampling rises"):
        fit(tmp_path, pattern="P", scheduled_sampling=0.9, schedule="constant", steps=-1)


def test_scheduled_sampling_replaces_a_share_of_the_labelled_tokens_by_samples_of_the_logits():
    tokens_BT = torch.zeros(64, 50, dtype=torch.long)
    labels_BT = tokens_BT.where(torch.arange(50) % 2 == 0, -100)
    logits_SBTV = torch.tensor([-torch.inf, 0.0, 1.0]).expand(1, 64, 50, 3)
    mixed_BT = mixed_tokens(tokens_BT, labels_BT, logits_SBTV, 0.5, [7], 3)
    assert (mixed_BT[:, 0] == 0).all()
    assert (mixed_BT[:, 2::2] == 0).all()  # the position before has no label
    after_BT = mixed_BT[:, 1::2]
    assert 0.45 < (after_BT > 0).double().mean() < 0.55
    assert abs((after_BT == 2).sum() / (after_BT > 0).sum() - torch.tensor(1.0).sigmoid()) < 0.05
    assert torch.equal(mixed_BT, mixed_tokens(tokens_BT, labels_BT, logits_SBTV, 0.5, [7], 3))
    assert not torch.equal(mixed_BT, mixed_tokens(tokens_BT, labels_BT, logits_SBTV, 0.5, [7], 4))
    assert torch.equal(mixed_tokens(tokens_BT, labels_BT, logits_SBTV, 0.0, [7], 3), tokens_BT)


def test_scheduled_sampling_needs_labels_that_are_the_next_tokens(tmp_path):
    trainer = Trainer(**QUIET | {"accelerator": "cpu", "max_steps": 2, "default_root_dir": tmp_path})
    module = Phase(6, 8, 16, 2, "P", scheduled_sampling=0.5, seed=0)
    with pytest.raises(UserError, match=r"needs labels that are the next tokens; `predicts_next` of State"):
        trainer.fit(module, datamodule=StateTracking("S3", train_len=5, test_len=8))
    trainer.test(module, datamodule=StateTracking("S3", train_len=5, test_len=8, test_size=4), verbose=False)
    assert Mixture([TextCorpus(), TextCorpus()]).predicts_next
    assert not Mixture([TextCorpus(), StateTracking()]).predicts_next


def test_a_mixture_of_texts_has_bits_per_character(tmp_path):
    sizes = {"max_size": 9000, "seq_len": 16, "validation_size": 4, "test_size": 4}
    data = Mixture([TextCorpus(level="bpe", bpe_vocab=300, **sizes), TextCorpus(**sizes)])
    module = Phase(300, 16, 16, 2, "P", seed=0)
    (metrics,) = Trainer(**QUIET | {"accelerator": "cpu", "default_root_dir": tmp_path}).test(
        module, data, verbose=False
    )
    rate = data.main.tokens_per_character("test")
    assert rate < 1  # tokens of several characters
    assert metrics["test/bits_per_character"] == pytest.approx(metrics["test/loss"] / math.log(2) * rate, rel=1e-5)
