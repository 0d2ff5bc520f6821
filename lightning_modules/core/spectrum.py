"""Singular values, and how many directions a matrix uses.

Shapes: M by N matrices with R = min(M, N) singular values, after any leading axes.
"""

import torch
from torch import Tensor


def singular_values(x_MN: Tensor) -> Tensor:
    """Return the singular values of each matrix in falling order, [..., R]; NaN for a matrix that is not finite."""
    finite = x_MN.isfinite().all(-1).all(-1)
    values_R: Tensor = torch.linalg.svdvals(x_MN.where(finite[..., None, None], 0.0))
    return values_R.where(finite[..., None], torch.nan)


def rank_of(values_R: Tensor) -> Tensor:
    """Return the effective rank of singular values over the last axis (Roy and Vetterli 2007); 0 for zeros.

    exp(-sum_i p_i ln p_i), p_i = s_i / sum_j s_j. It is n for n equal singular values.
    """
    total = values_R.sum(-1, keepdim=True)
    p_R = values_R / total.where(total != 0, 1.0)
    return torch.where(total[..., 0] != 0, torch.special.entr(p_R).sum(-1).exp(), 0.0)
