"""Estimates over seeds: means, differences, ratios and rates with 95 % intervals, and what pairing seeds adds."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from scipy import stats

from lightning_modules.metrics import wilson_interval

MOST_SEEDS = 1000  # beyond this many, the answer is that more seeds do not help


@dataclass(frozen=True)
class Measured:
    """A measure in one run.

    Attributes:
        value: The value.
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


def _values(series: Series, seeds: Iterable[int] | None = None) -> np.ndarray:
    return np.array([series[seed].value for seed in (sorted(series) if seeds is None else seeds)], dtype=float)


def mean(series: Series) -> Estimate:
    """Mean over seeds with Student's interval.

    Proportions have at least the Wilson interval of all their samples together: seeds that agree by chance, such as
    three zeros, do not make it certain. A single seed has the interval of its run.
    """
    values = _values(series)
    if len(values) == 1:
        (only,) = series.values()
        if only.interval is None:
            return Estimate(only.value, seeds=1, note="one seed, whose run gives no interval")
        return Estimate(only.value, *only.interval, seeds=1, note="one seed: the interval is over its test samples")
    low, high = t_interval(values)
    if pooled := _pooled(series):
        low, high = min(low, pooled[0]), max(high, pooled[1])
    return Estimate(float(values.mean()), low, high, len(values), float(values.std(ddof=1)))


def _pooled(series: Series) -> tuple[float, float] | None:
    """Wilson's interval of all samples of all seeds, if the measure is a proportion."""
    hits = [measured.hits for measured in series.values()]
    if any(hit is None for hit in hits):
        return None
    return wilson_interval(sum(hits), sum(measured.count for measured in series.values()))


def difference(first: Series, second: Series) -> Estimate:
    """Mean of first - second.

    Paired by seed where at least two seeds are common, else Welch's interval. Of single runs, and as the least for
    proportions, the intervals of the two are combined (Zou and Donner 2008): L = d - sqrt((x-lx)² + (uy-y)²).
    """
    common = sorted(first.keys() & second.keys())
    if len(common) > 1:
        deltas = _values(first, common) - _values(second, common)
        (low, high), spread, note = t_interval(deltas), float(deltas.std(ddof=1)), ""
        value, seeds = float(deltas.mean()), len(common)
    elif min(len(first), len(second)) > 1:
        x, y = _values(first), _values(second)
        (low, high), note = stats.ttest_ind(x, y, equal_var=False).confidence_interval(), "seeds are not paired"
        value, seeds = float(x.mean() - y.mean()), min(len(x), len(y))
        spread = math.sqrt(x.var(ddof=1) + y.var(ddof=1))
    else:
        x, y = mean(first), mean(second)
        note = x.note or y.note
        low, high = _combine((x.value, x.low, x.high), (y.value, y.low, y.high))
        return Estimate(x.value - y.value, low, high, min(x.seeds, y.seeds), note=note)
    pooled = _pooled(first), _pooled(second)
    if None not in pooled:
        least = _combine((_values(first).mean(), *pooled[0]), (_values(second).mean(), *pooled[1]))
        low, high = min(low, least[0]), max(high, least[1])
    return Estimate(value, float(low), float(high), seeds, spread, note)


def _combine(x: tuple[float, float, float], y: tuple[float, float, float]) -> tuple[float, float]:
    (value, low, high), (other, other_low, other_high) = x, y
    below, above = math.hypot(value - low, other_high - other), math.hypot(high - value, other - other_low)
    return value - other - below, value - other + above


def ratio(first: Series, second: Series) -> Estimate:
    """mean(first) / mean(second), with Fieller's interval (1954): the r at which mean(first - r second) may be zero.

    Over common seeds; of single runs, Fieller's with the standard errors that their own intervals tell. Where the
    denominator may be zero, nothing is known of the ratio.
    """
    common = sorted(first.keys() & second.keys())
    if len(common) > 1:
        x, y = _values(first, common), _values(second, common)
        (vx, cxy), (_, vy) = np.cov(x, y) / len(common)
        t = float(stats.t.ppf(0.975, len(common) - 1))
        value = float(x.mean() / y.mean()) if y.mean() else math.nan
        low, high = _fieller(x.mean(), y.mean(), t * t * vx, t * t * vy, t * t * cxy)
        spread = float((x - value * y).std(ddof=1) / abs(y.mean())) if y.mean() else None
        return Estimate(value, low, high, len(common), spread)
    x, y = mean(first), mean(second)
    value = x.value / y.value if y.value else math.nan
    halves = ((x.high - x.low) / 2) ** 2, ((y.high - y.low) / 2) ** 2
    low, high = _fieller(x.value, y.value, *halves, 0.0) if all(map(math.isfinite, halves)) else (-math.inf, math.inf)
    return Estimate(value, low, high, min(x.seeds, y.seeds), note=x.note or y.note)


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
    common = sorted(first.keys() & second.keys())
    if len(common) > 1:
        x, y = _values(first, common), _values(second, common)
        return float(stats.ttest_rel(x, y).pvalue) if (x - y).std() > 0 else None
    if min(len(first), len(second)) < 2:
        return None
    return float(stats.ttest_ind(_values(first), _values(second), equal_var=False).pvalue)


def seeds_to_decide(estimate: Estimate, bounds: list[float]) -> str:
    """How many seeds would take the bounds out of the interval, if value and spread stay what they are."""
    gap = min(abs(estimate.value - bound) for bound in bounds)
    if estimate.is_rate:
        hits = [(n, wilson_interval(estimate.value * n, n)) for n in range(estimate.seeds + 1, MOST_SEEDS + 1)]
        enough = [n for n, (low, high) in hits if not any(low <= bound <= high for bound in bounds)]
    elif estimate.spread is None:
        return "at least 2 seeds would tell the spread" if estimate.seeds < 2 else ""
    else:
        n = np.arange(2, MOST_SEEDS + 1)
        enough = n[stats.t.ppf(0.975, n - 1) * estimate.spread / np.sqrt(n) < gap].tolist()
    if not enough:
        return f"more than {MOST_SEEDS} seeds would be needed"
    if enough[0] <= estimate.seeds:
        return "more test samples would decide, not more seeds"
    return f"about {enough[0]} seeds would decide"
