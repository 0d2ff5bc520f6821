"""Intervals of proportions; needs no torch, so that commands without a model start at once."""

import math
from collections.abc import Sequence

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson_interval(hits: float, count: float) -> tuple[float, float]:
    """Return the Wilson score interval at 95 % of `hits` out of `count` (Wilson 1927).

    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n); (0, 1) where `count` is 0.
    """
    if count == 0:
        return 0.0, 1.0
    p, z2 = hits / count, Z95**2
    middle, spread = p + z2 / (2 * count), Z95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2))
    low, high = (middle - spread) / (1 + z2 / count), (middle + spread) / (1 + z2 / count)
    return low if hits else 0.0, high if hits < count else 1.0  # exact where rounding is not


def mean_interval(hits: Sequence[float], counts: Sequence[float]) -> tuple[float, float]:
    """Return an interval at 95 % of the mean of proportions of independent samples, each with the same weight.

    With the Wilson interval (l_i, u_i) of each proportion p_i of G, the bounds are mean(p) - sqrt(sum (p_i - l_i)²) / G
    and mean(p) + sqrt(sum (u_i - p_i)²) / G (the method of variance estimates recovery, Zou and Donner 2008).
    """
    shares = [hit / count for hit, count in zip(hits, counts, strict=True)]
    bounds = [wilson_interval(hit, count) for hit, count in zip(hits, counts, strict=True)]
    below = math.hypot(*(p - low for p, (low, _) in zip(shares, bounds, strict=True)))
    above = math.hypot(*(high - p for p, (_, high) in zip(shares, bounds, strict=True)))
    mean = sum(shares) / len(shares)
    return mean - below / len(shares), mean + above / len(shares)
