"""Estimates over seeds against scipy and against what intervals promise."""

import math

import numpy as np
import pytest
from scipy import stats

from lightning_modules.core.intervals import wilson_interval
from studies.engine.claims import Region
from studies.engine.statistics import (
    Measured,
    difference,
    effect_size,
    mean,
    p_value,
    rate,
    ratio,
    seeds_to_decide,
)

CASES = [(seed, count) for seed in range(4) for count in (2, 3, 8)]


def draw(seed, count, centre=1.0):
    return np.random.default_rng(seed).normal(centre, 0.3, count)


def series(values, first=0):
    return {first + place: Measured(float(value)) for place, value in enumerate(values)}


def proportion(hits, count):
    return Measured(hits / count, wilson_interval(hits, count), count, hits)


@pytest.mark.parametrize(("seed", "count"), CASES)
def test_mean_is_student(seed, count):
    values = draw(seed, count)
    found = mean(series(values))
    expected = stats.ttest_1samp(values, 0).confidence_interval()
    assert found.value == pytest.approx(values.mean())
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


@pytest.mark.parametrize(("seed", "count"), CASES)
def test_common_seeds_are_paired(seed, count):
    x, y = draw(seed, count), draw(seed + 100, count)
    found, test = difference(series(x), series(y)), stats.ttest_rel(x, y)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval()))
    assert p_value(series(x), series(y)) == pytest.approx(test.pvalue)


def test_a_seed_that_one_arm_lacks_is_left_out_of_the_pairs():
    x, y = draw(0, 5), draw(1, 4)
    assert difference(series(x), series(y)) == difference(series(x[:4]), series(y))
    far = series([1.0, 1.2, -50.0]), series([0.5, 0.8])  # the third seed of the second arm has failed
    assert difference(*far).value == pytest.approx(0.45)
    assert effect_size(*far) == effect_size(series([1.0, 1.2]), series([0.5, 0.8]))
    assert ratio(*far) == ratio(series([1.0, 1.2]), series([0.5, 0.8]))


@pytest.mark.parametrize(("seed", "count"), CASES)
def test_other_seeds_are_welchs(seed, count):
    x, y = draw(seed, count), draw(seed + 100, count + 1)
    found, test = difference(series(x), series(y, first=50)), stats.ttest_ind(x, y, equal_var=False)
    assert (found.low, found.high) == pytest.approx(tuple(test.confidence_interval()))
    assert p_value(series(x), series(y, first=50)) == pytest.approx(test.pvalue)
    assert found.note == "seeds are not paired"
    assert found.spread == pytest.approx(math.hypot(x.std(ddof=1), y.std(ddof=1)))
    assert (found.seeds, difference(series(y, first=50), series(x)).seeds) == (count, count)


@pytest.mark.parametrize(("seed", "count"), [(seed, count) for seed in range(4) for count in (3, 8)])
def test_the_ratios_interval_is_where_the_paired_test_does_not_reject(seed, count):
    x, y = draw(seed, count), draw(seed + 100, count, centre=4.0)
    found = ratio(series(x), series(y))
    for end in (found.low, found.high):
        assert stats.ttest_1samp(x - end * y, 0).pvalue == pytest.approx(0.05, abs=1e-6)
    assert found.value == pytest.approx(x.mean() / y.mean())
    assert found.low < found.value < found.high
    assert found.spread == pytest.approx((x - found.value * y).std(ddof=1) / y.mean())


def test_a_denominator_that_may_be_zero_leaves_the_ratio_open():
    found = ratio(series([1.0, 1.1, 0.9]), series([-0.1, 0.1, 0.2]))
    assert (found.low, found.high) == (-math.inf, math.inf)
    zero = ratio(series([1.0, 1.1, 0.9]), series([0.0, 0.0, 0.0]))
    assert (math.isnan(zero.value), zero.low, zero.high, zero.spread) == (True, -math.inf, math.inf, None)


def test_a_wilson_interval_is_scipys():
    low, high = wilson_interval(7, 40)
    assert (low, high) == pytest.approx(tuple(stats.binomtest(7, 40).proportion_ci(method="wilson")))
    found = rate(series([0.2] * 33 + [0.8] * 7), lambda value: value > 0.5)
    assert (found.value, found.low, found.high) == pytest.approx((7 / 40, low, high))


def test_proportions_that_agree_by_chance_are_not_certain():
    found = mean({seed: proportion(0, 100) for seed in range(3)})
    assert (found.value, found.low) == (0, 0)
    assert found.high == pytest.approx(wilson_interval(0, 300)[1])
    apart = difference({s: proportion(0, 100) for s in range(3)}, {s: proportion(100, 100) for s in range(3)})
    assert apart.low == pytest.approx(-1)
    assert apart.high > -1
    assert mean(series([0.0, 0.0, 0.0])).high == 0  # no proportion: nothing tells how many samples are behind


def test_only_counted_hits_make_a_proportion():
    alike = {seed: Measured(0.0, wilson_interval(0, 100), 100) for seed in range(3)}  # a value in Wilson's interval
    assert (mean(alike).low, mean(alike).high) == (0, 0)


def test_seeds_that_are_one_sample_each_are_counted():
    found = mean({seed: proportion(int(seed < 3), 1) for seed in range(64)})
    assert (found.value, found.low, found.high) == (3 / 64, *wilson_interval(3, 64))
    assert found.is_rate
    assert not mean({0: proportion(1, 1), 1: proportion(50, 100)}).is_rate


def test_one_seed_has_the_interval_of_its_run():
    one, other = {0: proportion(80, 100)}, {0: proportion(20, 100)}
    assert (mean(one).low, mean(one).high) == wilson_interval(80, 100)
    found = difference(one, other)
    # Newcombe's interval of a difference of proportions, his method 10
    (l1, u1), (l2, u2) = wilson_interval(80, 100), wilson_interval(20, 100)
    assert found.low == pytest.approx(0.6 - math.hypot(0.8 - l1, u2 - 0.2))
    assert found.high == pytest.approx(0.6 + math.hypot(u1 - 0.8, 0.2 - l2))
    assert "one seed" in found.note
    many = {seed: proportion(20 + seed, 100) for seed in range(3)}
    assert difference(many, one).note == difference(one, many).note == ratio(many, one).note == mean(one).note


@pytest.mark.parametrize("statistic", [lambda x, y: mean(x), difference, ratio], ids=["mean", "difference", "ratio"])
def test_intervals_hold_what_they_promise(statistic):
    """Of 1000 intervals at 95 %, between 93 and 97 % hold the truth."""
    truth = statistic(series([2.0, 2.0]), series([5.0, 5.0])).value
    generator, held = np.random.default_rng(0), 0
    for _ in range(1000):
        shared = generator.normal(0, 0.3, 5)
        x, y = generator.normal(2, 0.3, 5) + shared, generator.normal(5, 0.3, 5) + shared
        found = statistic(series(x), series(y))
        held += found.low <= truth <= found.high
    assert 930 <= held <= 970


def test_effect_size_is_hedges():
    # means 2 and 4, standard deviation 1 each, 6 degrees of freedom short of 4 + 4: d = -2, corrected by 1 - 3/23
    x, y = np.array([1.0, 2.0, 2.0, 3.0]), np.array([3.0, 4.0, 4.0, 5.0])
    assert effect_size(series(x), series(y)) == pytest.approx(-2 / math.sqrt(2 / 3) * (1 - 3 / 23))
    assert effect_size(series([1.0]), series(y)) is None
    assert effect_size(series([1.0, 1.0]), series([2.0, 2.0])) is None


@pytest.mark.filterwarnings("error")
def test_rounding_is_no_variation():
    x, y = series([0.3, 0.4]), series([0.1, 0.2])  # the differences are 0.2 and, by rounding, 0.19999999999999998
    assert p_value(x, y) is None
    paired = difference(x, y)
    assert paired.low == paired.value == paired.high
    large = difference(series([1e6 + 0.1, 2e6 + 0.1]), series([1e6, 2e6]))
    assert large.low == large.value == large.high
    for one, other in np.random.default_rng(0).random((200, 2)).round(3):
        equal = ratio(series([one] * 3), series([other + 0.01] * 3))
        assert equal.low == equal.value == equal.high
    assert effect_size(series([0.3, 0.1 + 0.2]), series([0.5, 0.5])) is None
    apart = series([0.0, 0.0], first=5)
    found = difference(series([1.0, 1.0, 1.0]), apart)
    assert (found.value, found.low, found.high, found.note) == (1.0, 1.0, 1.0, "seeds are not paired")
    assert p_value(series([1.0, 1.0, 1.0]), apart) is None


def test_a_proportions_interval_stays_between_zero_and_one():
    found = mean({seed: proportion(hits, 100) for seed, hits in enumerate((98, 99, 100))})
    assert 0.95 < found.low < found.high == 1.0


def test_a_ratio_of_proportions_knows_how_many_samples_are_behind():
    found = ratio({s: proportion(0, 100) for s in range(3)}, {s: proportion(80 + s, 100) for s in range(3)})
    assert found.value == 0
    assert found.high == pytest.approx(wilson_interval(0, 300)[1] / 2 / 0.81, rel=0.1)


def test_seeds_that_would_decide_do_decide():
    values = draw(0, 3, centre=0.2)
    sentence = seeds_to_decide(mean(series(values)), lambda low, high: low > 0)
    needed = int(sentence.split()[1])
    assert sentence == f"about {needed} seeds would decide"
    for count, decided in ((needed - 1, False), (needed, True)):
        half = stats.t.ppf(0.975, count - 1) * values.std(ddof=1) / math.sqrt(count)
        assert (values.mean() > half) == decided


@pytest.mark.parametrize(
    ("estimate", "region", "sentence"),
    [
        (mean(series([0.5, 1.5])), Region(low=1), "more than 1000 seeds would be needed"),
        (
            mean({s: proportion(0, 100) for s in range(3)}),
            Region(high=0.005),
            "more seeds or test samples would decide",
        ),
        # Wilson's interval inverts the score test: (2/3 - 1/2) / sqrt(1/4 / n) > 1.96 from n = 35 on
        (rate(series([1.0, 1.0, 0.0]), bool), Region(low=0.5), "about 35 seeds would decide"),
        # n / (n + 1.96²) >= 0.9 from n = 35 on; that the interval ends on the bound 1 does not matter
        (rate(series([1.0] * 4), bool), Region(0.9, 1), "about 35 seeds would decide"),
    ],
)
def test_how_many_seeds_would_decide(estimate, region, sentence):
    assert seeds_to_decide(estimate, region.decides) == sentence
