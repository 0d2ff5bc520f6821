"""Proportions and their intervals."""

import math
from types import SimpleNamespace

import pytest
import torch

from lightning_modules.core.intervals import wilson_interval
from lightning_modules.core.metrics import Proportion, TokenMeasures
from lightning_modules.core.reporting import record_proportion


@pytest.mark.parametrize(
    ("hits", "count", "low", "high"),
    [
        (0, 10, 0.0, 0.27753),
        (5, 10, 0.23659, 0.76341),
        (1, 20, 0.00888, 0.23613),
        (81, 263, 0.25527, 0.36621),  # Newcombe 1998, table I, method 3: 0.2553 to 0.3662
        (20, 20, 0.83887, 1.0),
    ],
)
def test_wilson_interval(hits, count, low, high):
    assert wilson_interval(hits, count) == pytest.approx((low, high), abs=2e-5)


def test_wilson_interval_at_its_ends():
    assert wilson_interval(0, 0) == (0.0, 1.0)
    assert wilson_interval(0, 500)[0] == 0.0
    assert wilson_interval(500, 500)[1] == 1.0


def test_proportion_over_batches_and_ranks():
    ranks = [Proportion(), Proportion()]
    ranks[0].update(1.0)
    ranks[0].update(0.0)
    ranks[1].update(torch.tensor(6.0), 8)
    ranks[0].merge_state(ranks[1])
    share, low, high, count = ranks[0].compute().tolist()
    assert (share, count) == (pytest.approx(0.7), 10)
    assert (low, high) == pytest.approx(wilson_interval(7, 10), abs=1e-6)
    ranks[0].reset()
    assert math.isnan(ranks[0].compute()[0])


def test_proportion_of_nothing_is_unknown():
    share, low, high, count = Proportion().compute().tolist()
    assert math.isnan(share)
    assert (low, high, count) == (0.0, 1.0, 0.0)


def test_a_member_that_diverged_has_no_accuracy():
    measures = TokenMeasures(2)
    logits_SBTV = torch.zeros(2, 1, 3, 5)
    logits_SBTV[0, :, :, 2] = 1.0
    logits_SBTV[1] = torch.nan
    measures.update(logits_SBTV, torch.tensor([[2, 1, -100]]))
    values, hits, count = measures.compute()
    assert count == 2
    assert hits["accuracy"][0] == 1
    assert values["accuracy"][0] == 0.5
    assert values["accuracy"][1].isnan()
    assert values["loss"][1].isnan()


def test_a_label_needs_the_strictly_largest_logit_to_be_a_hit():
    """A model that gives equal logits has not answered, whatever `argmax` takes."""
    measures = TokenMeasures(1)
    measures.update(torch.tensor([[[[2.0, 2, 1], [2, 1, 1]]]]), torch.tensor([[0, 0]]))
    assert measures.compute()[1]["accuracy"].item() == 1


def test_a_proportion_without_a_value_has_neither_hits_nor_interval():
    module = SimpleNamespace(counts={}, hits={"test/accuracy": [3]}, intervals={"test/accuracy": (0.1, 0.9)})
    record_proportion(module, "test/accuracy", torch.tensor(torch.nan), 4)
    assert (module.counts, module.hits, module.intervals) == ({"test/accuracy": 4}, {}, {})
    record_proportion(module, "test/accuracy", torch.tensor(3.0), 4)
    assert module.hits == {"test/accuracy": [3]}
    assert module.intervals["test/accuracy"] == wilson_interval(3, 4)
    record_proportion(module, "test/share", torch.tensor([1.0, torch.nan]), 4)
    assert module.hits["test/share"] == [1, 0]
