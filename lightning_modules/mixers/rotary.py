"""Rotary positions.

Shapes: B batch, H heads, T positions, K head width.
"""

import torch
from torch import Tensor

BASE = 10_000.0


def rotate(x_BHTK: Tensor, positions_T: Tensor) -> Tensor:
    """Return rotary positions (Su et al. 2021, arXiv:2104.09864): channels i, i + K/2 turn by t / 10000^(2i/K)."""
    half = x_BHTK.shape[-1] // 2
    # fp32, since bf16 cannot tell late positions apart
    frequencies = BASE ** (-torch.arange(half, device=x_BHTK.device, dtype=torch.float32) / half)
    angles_TK = positions_T[:, None] * frequencies
    cos_TK, sin_TK = angles_TK.cos().to(x_BHTK.dtype), angles_TK.sin().to(x_BHTK.dtype)
    a_BHTK, b_BHTK = x_BHTK.chunk(2, -1)
    return torch.cat([a_BHTK * cos_TK - b_BHTK * sin_TK, a_BHTK * sin_TK + b_BHTK * cos_TK], -1)
