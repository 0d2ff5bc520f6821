"""Estimates over seeds: means, differences, ratios and rates with 95 % intervals, and what pairing seeds adds."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lightning_modules.core.metrics import wilson_interval

MOST_SEEDS = 1000  # beyond this many, the answer is that more seeds do not help


@dataclass(frozen=True)
class Measured:
    """A measure in one run.

    Attributes:
        value: The value; NaN where the run ended without one, as a diverged run does.
        interval: The run's own 95 % interval, over its test samples.
        count: Those samples.
    """

    value: float
    interval: tuple[float, float] | None = None
    count: int | None = None

    @property
    def hits(self) -> float | None:
        """What was counted, if the measure is a proportion: if its interval is Wilson's."""
        if self.interval is None or not self.count or not 0 <= self.value <= 1:
            return None
        hits = self.value * self.count
        return hits if np.allclose(self.interval, wilson_interval(hits, self.count), atol=1e-4) else None


Series = Mapping[int, Measured]  # seed -> what its run measured


@dataclass(frozen=True)
class Estimate:
    """A value with its 95 % interval.

    Attributes:
        value: The estimate.
        low: Lower end; the interval is the whole line where nothing is known.
        high: Upper end.
        seeds: Seeds behind it.
        spread: Standard deviation of what a seed adds, from which the number of seeds that would decide is told.
        note: What the interval is over, where it is not over seeds.
        is_rate: Whether it counts seeds.
    """

    value: float
    low: float = -math.inf
    high: float = math.inf
    seeds: int = 0
    spread: float | None = None
    note: str = ""
    is_rate: bool = False


def t_interval(values: np.ndarray) -> tuple[float, float]:
    """Student's interval of the mean: m ± t(n-1) s / sqrt(n)."""
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean() - half), float(values.mean() + half)


def _values(series: Series) -> np.ndarray:
    return np.array([series[seed].value for seed in sorted(series)], dtype=float)


def mean(series: Series) -> Estimate:
    """Mean over seeds with Student's interval.

    A proportion's lies in [0, 1] and is at least Wilson's of all samples together: seeds that agree by chance, such as
    three zeros, do not make it certain. Where each seed is one sample, it is Wilson's. A single seed has the interval
    of its run.
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
            return Estimate(float(values.mean()), *pooled, seeds=len(values), is_rate=True)
        low, high = max(min(low, pooled[0]), 0.0), min(max(high, pooled[1]), 1.0)
    return Estimate(float(values.mean()), low, high, len(values), float(values.std(ddof=1)))


def _pooled(series: Series) -> tuple[float, float] | None:
    """Wilson's interval of all samples of all seeds, if the measure is a proportion."""
    hits = [measured.hits for measured in series.values()]
    if any(hit is None for hit in hits):
        return None
    return wilson_interval(sum(hits), sum(measured.count for measured in series.values()))


def _common(first: Series, second: Series) -> tuple[Series, Series]:
    """Both over the seeds that they share, if these are at least two; else as they are."""
    seeds = sorted(first.keys() & second.keys())
    if len(seeds) < 2:
        return first, second
    return {seed: first[seed] for seed in seeds}, {seed: second[seed] for seed in seeds}


def difference(first: Series, second: Series) -> Estimate:
    """Mean of first - second.

    Paired by seed where at least two seeds are common, else Welch's interval. Of single runs, and as the least for
    proportions, the intervals of the two are combined (Zou and Donner 2008): L = d - sqrt((x-lx)² + (uy-y)²).
    """
    first, second = _common(first, second)
    x, y = _values(first), _values(second)
    value, seeds = float(x.mean() - y.mean()), min(len(x), len(y))
    if seeds == 1:
        one, other = mean(first), mean(second)
        return Estimate(value, *_combine(one, other), seeds, note=one.note or other.note)
    if first.keys() == second.keys():
        (low, high), spread, note = t_interval(x - y), float((x - y).std(ddof=1)), ""
    else:
        (low, high), note = stats.ttest_ind(x, y, equal_var=False).confidence_interval(), "seeds are not paired"
        spread = math.sqrt(x.var(ddof=1) + y.var(ddof=1))
    pooled = _pooled(first), _pooled(second)
    if None not in pooled:
        least = _combine(Estimate(x.mean(), *pooled[0]), Estimate(y.mean(), *pooled[1]))
        low, high = min(low, least[0]), max(high, least[1])
    return Estimate(value, float(low), float(high), seeds, spread, note)


def _combine(x: Estimate, y: Estimate) -> tuple[float, float]:
    below, above = math.hypot(x.value - x.low, y.high - y.value), math.hypot(x.high - x.value, y.value - y.low)
    return x.value - y.value - below, x.value - y.value + above


def ratio(first: Series, second: Series) -> Estimate:
    """mean(first) / mean(second), with Fieller's interval (1954): the r at which mean(first - r second) may be zero.

    Over common seeds; of other runs, and as the least for proportions, from the half widths of the two intervals. Where
    the denominator may be zero, nothing is known of the ratio.
    """
    first, second = _common(first, second)
    x, y = _values(first), _values(second)
    value, seeds = float(x.mean() / y.mean()) if y.mean() else math.nan, min(len(x), len(y))
    if seeds == 1 or first.keys() != second.keys():
        one, other = mean(first), mean(second)
        return Estimate(value, *_fieller_of(one, other), seeds, note=one.note or other.note)
    t = float(stats.t.ppf(0.975, seeds - 1))
    (vx, cxy), (_, vy) = np.cov(x, y) * t**2 / seeds
    low, high = _fieller(x.mean(), y.mean(), vx, vy, cxy)
    pooled = _pooled(first), _pooled(second)
    if None not in pooled:
        least = _fieller_of(Estimate(x.mean(), *pooled[0]), Estimate(y.mean(), *pooled[1]))
        low, high = min(low, least[0]), max(high, least[1])
    spread = float((x - value * y).std(ddof=1) / abs(y.mean())) if y.mean() else None
    return Estimate(value, low, high, seeds, spread)


def _fieller_of(x: Estimate, y: Estimate) -> tuple[float, float]:
    vx, vy = ((end.high - end.low) ** 2 / 4 for end in (x, y))
    return _fieller(x.value, y.value, vx, vy, 0.0) if math.isfinite(vx + vy) else (-math.inf, math.inf)


def _fieller(x: float, y: float, vx: float, vy: float, cxy: float) -> tuple[float, float]:
    """The r with (x - r y)² <= vx - 2 r cxy + r² vy, where that is an interval; variances times t²."""
    a, b, c = y * y - vy, x * y - cxy, x * x - vx
    if a <= 0:
        return -math.inf, math.inf
    root = math.sqrt(max(b * b - a * c, 0.0))
    return float((b - root) / a), float((b + root) / a)


def rate(series: Series, condition: Callable[[float], bool]) -> Estimate:
    """Share of seeds whose value satisfies a condition, with Wilson's interval."""
    hits, count = sum(bool(condition(measured.value)) for measured in series.values()), len(series)
    return Estimate(hits / count, *wilson_interval(hits, count), seeds=count, is_rate=True)


def effect_size(first: Series, second: Series) -> float | None:
    """Hedges' g: (mean difference) / (pooled standard deviation), times 1 - 3 / (4 (n + m) - 9) (Hedges 1981)."""
    x, y = _values(first), _values(second)
    if min(len(x), len(y)) < 2:
        return None
    freedom = len(x) + len(y) - 2
    pooled = math.sqrt(((len(x) - 1) * x.var(ddof=1) + (len(y) - 1) * y.var(ddof=1)) / freedom)
    return float((x.mean() - y.mean()) / pooled * (1 - 3 / (4 * (len(x) + len(y)) - 9))) if pooled else None


def p_value(first: Series, second: Series) -> float | None:
    """Two-sided p of the paired t test over common seeds, of Welch's where fewer than two are common."""
    first, second = _common(first, second)
    x, y = _values(first), _values(second)
    if min(len(x), len(y)) < 2:
        return None
    if first.keys() != second.keys():
        return float(stats.ttest_ind(x, y, equal_var=False).pvalue)
    return float(stats.ttest_rel(x, y).pvalue) if (x - y).std() > 0 else None


def seeds_to_decide(estimate: Estimate, decides: Callable[[float, float], bool]) -> str:
    """How many seeds would decide, if value and spread stay what they are.

    Args:
        estimate: What is known.
        decides: Whether an interval, from low to high, would.
    """

    def interval(seeds: int) -> tuple[float, float]:
        if estimate.is_rate:
            return wilson_interval(estimate.value * seeds, seeds)
        half = float(stats.t.ppf(0.975, seeds - 1)) * estimate.spread / math.sqrt(seeds)
        return estimate.value - half, estimate.value + half

    if estimate.spread is None and not estimate.is_rate:
        return "at least 2 seeds would tell the spread" if estimate.seeds < 2 else ""
    if decides(*interval(estimate.seeds)):
        return "more seeds or test samples would decide"  # Student's would; Wilson's, over samples, does not
    enough = (seeds for seeds in range(estimate.seeds + 1, MOST_SEEDS + 1) if decides(*interval(seeds)))
    needed = next(enough, None)
    return f"about {needed} seeds would decide" if needed else f"more than {MOST_SEEDS} seeds would be needed"
