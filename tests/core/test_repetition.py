"""The share of n-grams that a text repeats."""

import math

import pytest

from lightning_modules.core.repetition import repetition_rate


def test_repetition():
    assert repetition_rate(["a b c d e f g"]) == 0
    assert repetition_rate(["a b c d a b c d"]) == pytest.approx(1 / 5)  # abcd returns, bcda, cdab and dabc are new
    assert repetition_rate(["x x x x x x"]) == pytest.approx(2 / 3)
    assert repetition_rate(["a b c d e f g", "x x x x x x"]) == pytest.approx(1 / 3)
    assert repetition_rate(["a b c d", "a b c d"]) == 0  # not across texts
    assert repetition_rate(["a b a b"], n=2) == pytest.approx(1 / 3)
    assert math.isnan(repetition_rate(["too short"]))
    assert repetition_rate(["x x x x x x", "too short"]) == pytest.approx(2 / 3)
