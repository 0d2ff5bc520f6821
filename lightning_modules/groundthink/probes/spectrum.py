"""The singular values of the state, and how many directions it uses.

Shapes: R = min(K, V) singular values.
"""

import torch
from torch import Tensor


def singular_values(state_BHKV: Tensor) -> Tensor:
    """Return the singular values of each state in falling order, [B, H, R]; NaN for a state that is not finite."""
    finite_BH = state_BHKV.isfinite().all(-1).all(-1)
    values_BHR: Tensor = torch.linalg.svdvals(state_BHKV.where(finite_BH[..., None, None], 0.0))
    return values_BHR.where(finite_BH[..., None], torch.nan)


def effective_rank(values_R: Tensor) -> Tensor:
    """Return exp(-sum_i p_i ln p_i), p_i = s_i / sum_j s_j, over the last axis (Roy and Vetterli 2007); 0 for zeros.

    It is n for n equal singular values.
    """
    total = values_R.sum(-1, keepdim=True)
    p_R = values_R / total.where(total != 0, 1.0)
    return torch.where(total[..., 0] != 0, torch.special.entr(p_R).sum(-1).exp(), 0.0)
