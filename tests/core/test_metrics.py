"""Proportions and their intervals."""

import math

import pytest
import torch

from lightning_modules.core.intervals import wilson_interval
from lightning_modules.core.metrics import Proportion


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
