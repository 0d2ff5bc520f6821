"""Means over real positions.

Shapes: B batch, K positions, D features.
"""

import torch
from torch import Tensor


def masked_mean(x_BKD: Tensor, mask_BK: Tensor) -> Tensor:
    """Return the mean over real positions; zero for a row without any."""
    weight_BK1 = mask_BK[..., None].to(x_BKD.dtype)
    return (x_BKD * weight_BK1).sum(1) / weight_BK1.sum(1).clamp_min(1)


def row_mean(loss_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """Return the mean over rows of the mean over their real positions: ranks with equal rows have equal weights."""
    return masked_mean(torch.where(mask_BK, loss_BK, 0.0)[..., None], mask_BK).mean()
