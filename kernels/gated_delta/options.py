"""The options that every form of the gated delta rule has."""

import math
from typing import Literal, get_args

Rule = Literal["standard", "seed"]
Backend = Literal["reference", "triton"]


def default_scale(scale: float | None, width: int, rule: Rule) -> float:
    """Return `scale`, or its default: 1 / sqrt(width), and 1 under the seed's rule.

    Raises:
        ValueError: The rule is unknown, or the scale is no finite number.
    """
    if rule not in get_args(Rule):
        raise ValueError(f"rule must be one of {', '.join(get_args(Rule))}, not {rule}")
    if scale is not None:
        if isinstance(scale, bool) or not isinstance(scale, int | float) or not math.isfinite(scale):
            raise ValueError(f"scale must be a finite number, not {scale}")
        return scale
    return 1.0 if rule == "seed" else width**-0.5
