"""Intervals of proportions; needs no torch, so that commands without a model start at once."""

import math

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
