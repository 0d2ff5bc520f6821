"""AssociativeRecall: the sets of Zoology, their rows, and the power law of the gaps."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from datamodules import AssociativeRecall
from datamodules.batch import IGNORE
from datamodules.sequence_task import stream

SMALL = {"vocab_size": 40, "train_sets": [[16, 2, 10], [20, 4, 9]], "batch_size": 4, "seed": 3}


def make(**options):
    data = AssociativeRecall(
        **SMALL | {"test_sets": [[16, 3], [32, 8]], "test_size": 7, "validation_size": 2} | options
    )
    data.trainer = SimpleNamespace(
        global_rank=0,
        world_size=1,
        overfit_batches=0,
        limit_train_batches=1.0,
        lightning_module=SimpleNamespace(ensemble=1),
    )
    data.setup("fit")
    return data


def test_the_defaults_are_the_setting_of_zoology():
    data = AssociativeRecall()
    assert (data.vocab_size, data.power_a, data.batch_size, data.test_size) == (8192, 0.01, 256, 1000)
    assert (data.keys, data.values) == (range(1, 4096), range(4096, 8192))
    assert data.groups == ["64x4", "64x8", "64x16", "128x32", "256x64", "512x128", "1024x256"]
    assert (data.epoch_size, data.seq_len) == (180_000, 1024)
    lengths_and_pairs = [(length, pairs) for length, pairs, _ in data.train_sets]
    assert lengths_and_pairs == [(64, 4), (128, 8), (256, 16), (256, 32), (256, 64)]


def test_rows_hold_pairs_and_then_each_key_once_more():
    data = make()
    for batch in [*data.train_dataloader(), *data.test_dataloader()]:
        for tokens, labels in zip(batch["tokens"].tolist(), batch["labels"].tolist(), strict=True):
            asked = [place for place, label in enumerate(labels) if label != IGNORE]
            pairs = len(asked)
            values = dict(zip(tokens[: 2 * pairs : 2], tokens[1 : 2 * pairs : 2], strict=True))
            assert len(values) == len(set(values.values())) == pairs
            assert set(values) <= set(range(1, 20))
            assert set(values.values()) <= set(range(20, 40))
            assert all(place >= 2 * pairs and place % 2 == 0 for place in asked)
            assert {tokens[place]: labels[place] for place in asked} == values
            assert all(tokens[place] == 0 for place in range(2 * pairs, len(tokens)) if place not in asked)
            assert data.input_labels(tokens) == labels


def test_sets_are_fixed_and_a_batch_has_rows_of_one():
    data = make()
    loader = data.train_dataloader()
    epochs = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        epochs.append([batch["tokens"] for batch in loader])
    assert [tuple(tokens.shape) for tokens in epochs[0]] == [(3, 16), (3, 16), (4, 16), (3, 20), (3, 20), (3, 20)]
    assert all(torch.equal(*pair) for pair in zip(*epochs, strict=True))
    test = list(data.test_dataloader())
    assert [(tuple(batch["tokens"].shape)) for batch in test] == [(7, 16), (7, 32)]
    assert [data.groups[int(data.group_of(batch)[0, 0])] for batch in test] == ["16x3", "32x8"]


def test_gaps_follow_the_power_law_without_replacement():
    data = make(test_sets=[[24, 2]], power_a=0.5)  # ten gaps
    gap_BP = data.randomness(stream(0), 40_000)[2] - 1
    weight = np.arange(1, 11) ** -0.5
    first = np.bincount(gap_BP[:, 0], minlength=10) / len(gap_BP)
    assert first == pytest.approx(weight / weight.sum(), abs=0.01)
    second = np.bincount(gap_BP[gap_BP[:, 0] == 0, 1], minlength=10) / (gap_BP[:, 0] == 0).sum()
    assert second == pytest.approx(np.r_[0, weight[1:] / weight[1:].sum()], abs=0.015)


def test_a_steep_power_law_does_not_overflow():
    data = make(test_sets=[[1024, 4]], power_a=300)
    gap_BP = data.randomness(stream(0), 50)[2]
    assert gap_BP.min() > 480  # of 508 gaps, of which the last ones have nearly all the weight


def test_a_set_smaller_than_a_batch_is_one_batch_unless_a_device_gets_no_row():
    data = make(train_sets=[[16, 2, 3]])
    assert [len(batch["tokens"]) for batch in data.train_dataloader()] == [3]
    data = make(train_sets=[[16, 2, 10], [20, 4, 1]])
    data.trainer.world_size = 2
    with pytest.raises(ValueError, match=r"data.train_sets in 3 batches leave some of 2 devices without any"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"test_sets": [[64]]}, r"data.test_sets must be a list of \[length, pairs\], not \[\[64\]\]"),
        ({"train_sets": [[64, 20, 9]]}, r"data.train_sets\[0\]: 20 pairs and their queries need a length of 80"),
        ({"test_sets": [[128, 32]]}, r"data.test_sets\[0\]: 32 pairs are more than the 19 keys of data.vocab_size 40"),
        ({"test_sets": [[64, 2], [32, 2], [64, 2]]}, "data.test_sets has 64x2 twice"),
        ({"train_sets": [[64, 2, 0]]}, r"data.train_sets\[0\].rows must be at least 1, not 0"),
        ({"power_a": 0}, "data.power_a must be positive"),
    ],
)
def test_user_errors(options, reason):
    with pytest.raises(ValueError, match=reason):
        make(**options)
