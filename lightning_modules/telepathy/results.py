"""What a test records: the results of single problems, and the measures that are made of them.

Shapes: K soft tokens, D target width, G candidates per group.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from datamodules.problems import Problem
from lightning_modules.core.intervals import wilson_interval
from lightning_modules.pretrained.answers import Answer
from lightning_modules.telepathy.layout import Row

CONDITIONS = ("bridge", "shuffled", "zero", "text", "text_prefix", "none")

Array = NDArray[np.floating]
Indices = NDArray[np.integer]


@dataclass
class ProblemResult:
    """The results of one problem.

    The target answers under these conditions (`CONDITIONS`):

    - `bridge`: it reads the soft tokens of the question;
    - `shuffled`: the soft tokens of another question;
    - `zero`: zeros in the place of the soft tokens, as many as there are soft tokens;
    - `text`: the text of the question;
    - `text_prefix`: a learned prefix and the text, if the module has such a prefix;
    - `none`: the prompt alone.

    Attributes:
        problem: The problem.
        row: The row of the target around soft tokens.
        soft_count: Number of soft tokens.
        answers: Condition -> the generated answer; for all conditions but `none`.
        losses: Condition -> cross-entropy of each token of the reference answer, in nats.
        codes_K: The codes of the soft tokens, if there is a bottleneck.
        soft_KD: The soft tokens, kept for some problems only.
        candidates_G: Log-likelihood of the reference answer given the soft tokens of each problem of its group. None
            for problems outside of full groups.
        own: Index in `candidates_G` of the problem itself.
    """

    problem: Problem
    row: Row
    soft_count: int
    answers: dict[str, Answer]
    losses: dict[str, Array]
    codes_K: Indices | None = None
    soft_KD: Array | None = None
    candidates_G: Array | None = None
    own: int = 0


@dataclass
class Measures:
    """Measures by name.

    Attributes:
        values: The values.
        counts: Samples behind each value.
        hits: Of a proportion, how many of its samples are hits.
        intervals: 95 % intervals, (low, high): Wilson's for proportions, else bootstrap.
    """

    values: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    hits: dict[str, int] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, name: str, value: float, count: int, interval: tuple[float, float] | None = None) -> None:
        """Add one measure."""
        self.values[name], self.counts[name] = float(value), count
        if interval is not None:
            self.intervals[name] = interval

    def add_proportion(self, name: str, hits: Sequence[bool] | NDArray[np.bool_]) -> None:
        """Add the share of hits, with the number of hits and the Wilson interval."""
        total, count = int(sum(hits)), len(hits)
        self.add(name, total / count, count, wilson_interval(total, count))
        self.hits[name] = total

    def void(self, name: str) -> None:
        """Replace a value by NaN, without hits and interval."""
        self.values[name] = math.nan
        self.hits.pop(name, None)
        self.intervals.pop(name, None)


def bootstrap(count: int, statistic: Callable[[Indices], float], resamples: int = 1000) -> tuple[float, float]:
    """Return the percentile interval at 95 % of a statistic of `count` samples (Efron 1979), with a fixed seed.

    Args:
        count: Number of samples.
        statistic: Its value for an array of indices of samples.
        resamples: Number of resamples.
    """
    generator = np.random.default_rng(0)
    values = [statistic(generator.integers(0, count, count)) for _ in range(resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)
