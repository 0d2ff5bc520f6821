"""Estimates over seeds: means, differences, ratios and rates, each with its 95 % interval.

scipy is imported where it is used: a run starts sooner if its study has not waited for the import.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lightning_modules.core.intervals import wilson_interval

MAX_SEEDS = 1000  # no larger number of seeds is recommended
ROUNDING = 1e-12  # values that differ by less, relative to the largest, do not vary


@dataclass(frozen=True)
class Measured:
    """The value of a measure in one run, or in one member of an ensemble.

    Attributes:
        value: The value; NaN if the run ended without one, as a diverged run does.
        interval: The run's 95 % interval, over its test samples.
        count: Number of those samples.
        hits: Number of hits among them, if the measure is a proportion; None for every other measure.
        diverged: Whether the run diverged, so that it has no value.
    """

    value: float
    interval: tuple[float, float] | None = None
    count: int | None = None
    hits: int | None = None
    diverged: bool = False


Series = Mapping[int, Measured]  # seed -> value
Values = Mapping[str, Mapping[str, Series]]  # arm -> measure -> seed -> value


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval.

    Attributes:
        value: The estimate.
        low: Lower end of the interval; -inf if nothing is known.
        high: Upper end of the interval; inf if nothing is known.
        seeds: Number of seeds behind the estimate.
        spread: Standard deviation of one seed's contribution, which predicts the interval of more seeds; None if
            unknown.
        note: What the interval covers, if that is not the seeds.
        is_rate: Whether each seed counts as one hit or miss.
    """

    value: float
    low: float = -math.inf
    high: float = math.inf
    seeds: int = 0
    spread: float | None = None
    note: str = ""
    is_rate: bool = False


def t_interval(values: NDArray[np.float64], scale: NDArray[np.float64] | None = None) -> tuple[float, float]:
    """Return Student's 95 % interval of the mean: m ± t(n-1) s / sqrt(n); (m, m) of values that do not vary.

    Args:
        values: The values.
        scale: Numbers whose rounding is in the values, as that of the terms is in differences; None for the values.
    """
    centre = _mean(values)
    if not _vary(values, values if scale is None else scale):
        return centre, centre
    half = float(_t_quantile(len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values)))
    return centre - half, centre + half


def _mean(values: NDArray[np.float64]) -> float:
    """Return the mean; that of equal values is their value, without the rounding of a sum."""
    return float(values[0] if (values == values[0]).all() else values.mean())


def _t_quantile(freedom: int) -> float:
    """Return the 97.5 % quantile of Student's distribution."""
    from scipy import stats

    return float(stats.t.ppf(0.975, freedom))


def _values(series: Series) -> NDArray[np.float64]:
    return np.array([series[seed].value for seed in sorted(series)], dtype=np.float64)


def mean(series: Series) -> Estimate:
    """Estimate the mean over seeds, with Student's interval.

    The interval of a proportion lies in [0, 1] and contains the Wilson interval of the samples of all seeds together:
    seeds that agree by chance, such as three zeros, do not make the mean certain. If each seed is a single sample, the
    interval is Wilson's. A single seed has the interval of its run.
    """
    values = _values(series)
    if len(values) == 1:
        (only,) = series.values()
        if only.interval is None:
            return Estimate(only.value, seeds=1, note="one seed, whose run gives no interval")
        return Estimate(only.value, *only.interval, seeds=1, note="one seed: the interval is over its test samples")
    low, high = t_interval(values)
    if pooled := _pooled(series):
        if all(measured.count == 1 for measured in series.values()):
            return Estimate(_mean(values), *pooled, seeds=len(values), is_rate=True)
        low, high = max(min(low, pooled[0]), 0.0), min(max(high, pooled[1]), 1.0)
    return Estimate(_mean(values), low, high, len(values), float(values.std(ddof=1)))


def _pooled(series: Series) -> tuple[float, float] | None:
    """Return the Wilson interval of the samples of all seeds together, if the measure is a proportion."""
    hits = count = 0
    for measured in series.values():
        if measured.hits is None or measured.count is None:
            return None
        hits, count = hits + measured.hits, count + measured.count
    return wilson_interval(hits, count)


def _common(first: Series, second: Series) -> tuple[Series, Series]:
    """Restrict both series to their common seeds if there are at least two; else return both unchanged."""
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < 2:
        return first, second
    return {seed: first[seed] for seed in seeds}, {seed: second[seed] for seed in seeds}


def difference(first: Series, second: Series) -> Estimate:
    """Estimate mean(first) - mean(second).

    The interval is paired by seed if at least two seeds are common, else Welch's. The intervals of single runs are
    combined (Zou and Donner 2008): L = d - sqrt((x-lx)² + (uy-y)²), U = d + sqrt((ux-x)² + (y-ly)²). The interval of a
    difference of proportions also contains this combination of the two pooled Wilson intervals.
    """
    first, second = _common(first, second)
    x, y = _values(first), _values(second)
    value, seeds = _mean(x) - _mean(y), min(len(x), len(y))
    if seeds == 1:
        one, other = mean(first), mean(second)
        return Estimate(value, *_combine(one, other), seeds, note=one.note or other.note)
    if first.keys() == second.keys():
        value, spread, note = _mean(x - y), float((x - y).std(ddof=1)), ""
        low, high = t_interval(x - y, np.stack((x, y)))
    else:
        from scipy import stats

        (low, high), note = (value, value), "seeds are not paired"
        if _vary(x, x) or _vary(y, y):
            low, high = stats.ttest_ind(x, y, equal_var=False).confidence_interval()
        spread = math.sqrt(x.var(ddof=1) + y.var(ddof=1))
    if (one_pooled := _pooled_mean(first)) and (other_pooled := _pooled_mean(second)):
        least = _combine(one_pooled, other_pooled)
        low, high = min(low, least[0]), max(high, least[1])
    return Estimate(value, float(low), float(high), seeds, spread, note)


def _pooled_mean(series: Series) -> Estimate | None:
    """Return the mean of a proportion with the Wilson interval of all samples; None for every other measure."""
    pooled = _pooled(series)
    return Estimate(_mean(_values(series)), *pooled) if pooled else None


def _combine(x: Estimate, y: Estimate) -> tuple[float, float]:
    below, above = math.hypot(x.value - x.low, y.high - y.value), math.hypot(x.high - x.value, y.value - y.low)
    return x.value - y.value - below, x.value - y.value + above


def ratio(first: Series, second: Series) -> Estimate:
    """Estimate mean(first) / mean(second), with Fieller's interval (1954).

    The interval holds every r for which mean(first - r second) may be zero. Over common seeds it uses their variances
    and covariance, else the half widths of the two intervals. The interval of a ratio of proportions also contains the
    one from the two pooled Wilson intervals. If the denominator may be zero, the interval is the whole line.
    """
    first, second = _common(first, second)
    x, y = _values(first), _values(second)
    value, seeds = _mean(x) / _mean(y) if _mean(y) else math.nan, min(len(x), len(y))
    if seeds == 1 or first.keys() != second.keys():
        one, other = mean(first), mean(second)
        return Estimate(value, *_fieller_of(one, other), seeds, note=one.note or other.note)
    ((vx, cxy), (_, vy)) = (np.cov(x, y) * _t_quantile(seeds - 1) ** 2 / seeds).tolist()
    low, high = _fieller(_mean(x), _mean(y), vx, vy, cxy)
    if math.isfinite(low) and not _vary(x - value * y, np.stack((x, y))):
        low = high = value  # the root would enlarge the rounding
    if (one_pooled := _pooled_mean(first)) and (other_pooled := _pooled_mean(second)):
        least = _fieller_of(one_pooled, other_pooled)
        low, high = min(low, least[0]), max(high, least[1])
    spread = float((x - value * y).std(ddof=1) / abs(_mean(y))) if _mean(y) else None
    return Estimate(value, low, high, seeds, spread)


def _fieller_of(x: Estimate, y: Estimate) -> tuple[float, float]:
    vx, vy = ((end.high - end.low) ** 2 / 4 for end in (x, y))
    return _fieller(x.value, y.value, vx, vy, 0.0) if math.isfinite(vx + vy) else (-math.inf, math.inf)


def _fieller(x: float, y: float, vx: float, vy: float, cxy: float) -> tuple[float, float]:
    """Return the interval of all r with (x - r y)² <= vx - 2 r cxy + r² vy; the variances are multiplied by t²."""
    a, b, c = y * y - vy, x * y - cxy, x * x - vx
    if a <= 0:
        return -math.inf, math.inf
    root = math.sqrt(max(b * b - a * c, 0.0))
    return (b - root) / a, (b + root) / a


def rate(series: Series, condition: Callable[[float], bool]) -> Estimate:
    """Estimate the share of seeds whose value satisfies a condition, with its Wilson interval."""
    hits, count = sum(bool(condition(measured.value)) for measured in series.values()), len(series)
    return Estimate(hits / count, *wilson_interval(hits, count), seeds=count, is_rate=True)


def effect_size(first: Series, second: Series) -> float | None:
    """Return Hedges' g: mean difference / pooled standard deviation, times 1 - 3 / (4 (n + m) - 9) (Hedges 1981).

    Over common seeds if there are at least two, as `difference`. None if either series has fewer than two seeds or
    nothing varies.
    """
    first, second = _common(first, second)
    x, y = _values(first), _values(second)
    if min(len(x), len(y)) < 2 or not (_vary(x, x) or _vary(y, y)):
        return None
    freedom = len(x) + len(y) - 2
    pooled = math.sqrt(((len(x) - 1) * x.var(ddof=1) + (len(y) - 1) * y.var(ddof=1)) / freedom)
    return float((x.mean() - y.mean()) / pooled * (1 - 3 / (4 * (len(x) + len(y)) - 9)))


def p_value(first: Series, second: Series) -> float | None:
    """Return the two-sided p of the paired t test over common seeds; of Welch's test if fewer than two are common.

    None if either series has fewer than two seeds, or nothing varies: neither the pairs, nor unpaired values.
    """
    from scipy import stats

    first, second = _common(first, second)
    x, y = _values(first), _values(second)
    if min(len(x), len(y)) < 2:
        return None
    if first.keys() != second.keys():
        return float(stats.ttest_ind(x, y, equal_var=False).pvalue) if _vary(x, x) or _vary(y, y) else None
    return float(stats.ttest_rel(x, y).pvalue) if _vary(x - y, np.stack((x, y))) else None


def _vary(values: NDArray[np.float64], scale: NDArray[np.float64]) -> bool:
    """Return whether values differ by more than the rounding of numbers as large as those of `scale`."""
    return bool(np.ptp(values) > ROUNDING * np.abs(scale).max())


def seeds_to_decide(estimate: Estimate, decides: Callable[[float, float], bool]) -> str:
    """Return a sentence: how many seeds would decide a claim if the value and the spread stay as they are.

    Args:
        estimate: The estimate so far.
        decides: Whether an interval, from low to high, decides the claim.
    """
    spread = estimate.spread
    if spread is None and not estimate.is_rate:
        return "at least 2 seeds would show the spread" if estimate.seeds < 2 else ""

    def interval(seeds: int) -> tuple[float, float]:
        if spread is None:
            return wilson_interval(estimate.value * seeds, seeds)
        half = _t_quantile(seeds - 1) * spread / math.sqrt(seeds)
        return estimate.value - half, estimate.value + half

    if decides(*interval(estimate.seeds)):
        return "more seeds or test samples would decide"  # Student's interval decides; Wilson's, over samples, does not
    enough = (seeds for seeds in range(estimate.seeds + 1, MAX_SEEDS + 1) if decides(*interval(seeds)))
    needed = next(enough, None)
    return f"about {needed} seeds would decide" if needed else f"more than {MAX_SEEDS} seeds would be needed"
