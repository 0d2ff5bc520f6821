"""Rotary positions.

Shapes: B batch, T positions, H heads, K head width.
"""

import torch
from torch import Tensor

BASE = 10_000.0


def rotate(x_BTHK: Tensor, positions_T: Tensor) -> Tensor:
    """Return rotary positions (Su et al. 2021, arXiv:2104.09864): channels i, i + K/2 turn by t / 10000^(2i/K)."""
    half = x_BTHK.shape[-1] // 2
    # fp32, since bf16 cannot tell late positions apart
    frequencies = BASE ** (-torch.arange(half, device=x_BTHK.device, dtype=torch.float32) / half)
    angles_T1K = positions_T[:, None, None] * frequencies
    cos_T1K, sin_T1K = angles_T1K.cos().to(x_BTHK.dtype), angles_T1K.sin().to(x_BTHK.dtype)
    a_BTHK, b_BTHK = x_BTHK.chunk(2, -1)
    return torch.cat([a_BTHK * cos_T1K - b_BTHK * sin_T1K, a_BTHK * sin_T1K + b_BTHK * cos_T1K], -1)
