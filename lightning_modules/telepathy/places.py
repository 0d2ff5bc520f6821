"""Where in the source the queries of a bridge look.

Shapes: B batch, S source positions, K places, N = B * heads.
"""

import torch
from torch import Tensor

SLOPE = 4.0  # of attention over distance at the start: nearly all weight is on the nearest token


def places(count: int, span: int, device: torch.device) -> Tensor:
    """Return place_K, `count` source positions spread evenly over `span`: integers, and several may be equal."""
    return torch.arange(count, device=device) * span // count


def place_bias(place_K: Tensor, mask_BS: Tensor, slope: float, heads: int) -> Tensor:
    """Return bias_NKS = -slope |place_k - s| + c of attention over the source, -inf at padding; N = B * heads.

    c makes the bias of the nearest real position 0: a softmax does not change by it. Without it, a query far behind a
    question would have scores below -88 alone, whose exponential is 0 in fp32, and a kernel that divides by their sum
    may give NaN for its gradient.
    """
    distance_KS = (place_K[:, None] - torch.arange(mask_BS.shape[1], device=mask_BS.device)).abs()
    bias_BKS = (-slope * distance_KS).masked_fill(~mask_BS[:, None], -torch.inf)
    return (bias_BKS - bias_BKS.amax(-1, keepdim=True)).repeat_interleave(heads, dim=0)
