"""Accuracy by group is what a count over queries gives, whatever the batches and the members."""

import json

import numpy as np
import pytest
import torch
from conftest import QUIET
from lightning import Trainer

from callbacks import GroupAccuracy, RunRecord
from datamodules import AssociativeRecall, Mixture, ModularArithmetic, StateTracking
from datamodules.batch import IGNORE
from datamodules.errors import UserError
from lightning_modules.core.intervals import mean_interval, wilson_interval
from lightning_modules.groundthink import GroundThink

SIZES = {"width": 16, "window": 4, "seed": 0}


def recall(**options) -> AssociativeRecall:
    sizes = {"train_sets": [[8, 2, 8]], "test_sets": [[8, 1], [16, 4]], "batch_size": 4, "eval_batch_size": 3}
    return AssociativeRecall(vocab_size=16, **sizes | {"validation_size": 5, "test_size": 7} | options)


def measured(folder, module, data, command="test") -> dict:
    callbacks = [GroupAccuracy(), RunRecord()]
    trainer = Trainer(accelerator="cpu", default_root_dir=folder, callbacks=callbacks, **QUIET)
    getattr(trainer, command)(module, datamodule=data, verbose=False)
    return json.loads((folder / "results.json").read_text())


@pytest.mark.parametrize(("command", "split", "rows"), [("test", "test", 7), ("validate", "validation", 5)])
def test_accuracy_of_each_test_set(tmp_path, command, split, rows):
    module = GroundThink(vocab_size=16, seq_len=16, **SIZES)
    record = measured(tmp_path, module, recall(), command)
    data, shares = recall(), []
    loader = data.test_dataloader() if split == "test" else data.val_dataloader()
    hits, counts = {8: 0, 16: 0}, {8: 0, 16: 0}
    for batch in loader:
        labelled = batch["labels"] != IGNORE
        with torch.no_grad():
            right = module(batch["tokens"]).argmax(-1)[labelled] == batch["labels"][labelled]
        hits[batch["tokens"].shape[1]] += int(right.sum())
        counts[batch["tokens"].shape[1]] += len(right)
    for length, name in ((8, "8x1"), (16, "16x4")):
        shares.append(hits[length] / counts[length])
        assert record["n"][f"{split}/accuracy_{name}"] == counts[length] == rows * (1 if length == 8 else 4)
        assert record["metrics"][f"{split}/accuracy_{name}"] == pytest.approx(shares[-1], rel=1e-4)
        assert record["hits"][f"{split}/accuracy_{name}"] == [hits[length]]
    assert record["metrics"][f"{split}/accuracy_by_group"] == pytest.approx(sum(shares) / 2, rel=1e-4)
    assert record["intervals"][f"{split}/accuracy_by_group"] == pytest.approx(
        mean_interval(list(hits.values()), list(counts.values())), abs=1e-6
    )
    pooled = sum(hits.values()) / sum(counts.values())
    assert record["metrics"][f"{split}/accuracy"] == pytest.approx(pooled, rel=1e-4)


def test_a_mixture_has_the_groups_of_its_held_out_task(tmp_path):
    alone = measured(tmp_path / "alone", GroundThink(vocab_size=16, seq_len=16, **SIZES), recall())
    inner = Mixture([StateTracking(train_len=8, test_len=8, batch_size=4), recall()], held_out=1)
    outer = Mixture([inner, StateTracking(train_len=8, test_len=8, batch_size=4)])
    mixed = measured(tmp_path / "mixed", GroundThink(vocab_size=16, seq_len=16, **SIZES), outer)
    assert mixed["metrics"]["test/accuracy_16x4"] == alone["metrics"]["test/accuracy_16x4"]
    assert mixed["hits"] == alone["hits"]


def test_the_interval_of_a_mean_over_groups_covers_it_at_95_percent():
    rng, shares, counts = np.random.default_rng(0), np.array([0.98, 0.5, 0.1]), [200, 50, 400]
    bounds = np.array([mean_interval(hits, counts) for hits in rng.binomial(counts, shares, (4000, 3)).tolist()])
    covers = (bounds[:, 0] <= shares.mean()) & (shares.mean() <= bounds[:, 1])
    assert 0.935 < covers.mean() < 0.965
    assert mean_interval([7], [9]) == pytest.approx(wilson_interval(7, 9))


def test_members_of_an_ensemble_have_what_each_has_alone(tmp_path):
    sizes = {"vocab_size": 6, "seq_len": 20, **SIZES}
    data = {"group": "S3", "train_len": 4, "test_len": 20, "validation_size": 4, "test_size": 64, "eval_batch_size": 9}
    both = measured(tmp_path / "both", GroundThink(**sizes, ensemble=2), StateTracking(**data))
    alone = measured(tmp_path / "alone", GroundThink(**sizes | {"seed": 1}), StateTracking(**data))
    for name in ("accuracy_position_to_1", "accuracy_position_to_32", "accuracy_by_group"):
        assert both["members"][f"test/{name}"][1] == pytest.approx(alone["metrics"][f"test/{name}"])
    assert both["n"]["test/accuracy_position_to_32"] == 64 * 4


def test_a_mistake_is_told_in_a_sentence(tmp_path):
    trainer = Trainer(callbacks=[GroupAccuracy()], **QUIET)
    with pytest.raises(UserError, match="needs data with groups, such as StateTracking, not ModularArithmetic"):
        trainer.test(GroundThink(vocab_size=100, seq_len=8, **SIZES), ModularArithmetic())
    with pytest.raises(UserError, match="Two GroupAccuracy callbacks"):
        Trainer(callbacks=[GroupAccuracy(), GroupAccuracy()], **QUIET).test(
            GroundThink(vocab_size=16, seq_len=16, **SIZES), recall()
        )


def test_it_reads_the_batches_that_the_trainer_takes(tmp_path):
    trainer = Trainer(
        accelerator="cpu",
        default_root_dir=tmp_path,
        callbacks=[GroupAccuracy(), RunRecord()],
        limit_test_batches=2,
        **QUIET,
    )
    trainer.test(GroundThink(vocab_size=16, seq_len=16, **SIZES), recall(), verbose=False)
    counts = json.loads((tmp_path / "results.json").read_text())["n"]
    groups = [count for name, count in counts.items() if name.startswith("test/accuracy_")]
    assert sum(groups) == counts["test/accuracy"] < 7 + 4 * 7


def test_a_member_that_diverged_has_no_accuracy(tmp_path):
    module = GroundThink(vocab_size=16, seq_len=16, **SIZES, ensemble=2)
    with torch.no_grad():
        module.network.unembed.weight[1] = torch.nan
    members = measured(tmp_path, module, recall())["members"]
    for name in ("accuracy", "accuracy_8x1", "accuracy_by_group"):
        assert members[f"test/{name}"][0] is not None
        assert members[f"test/{name}"][1] is None
