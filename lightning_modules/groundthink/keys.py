"""Keys that a position has whatever its token is.

Shapes: B batch, T positions, H heads, K key width.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

MASK = 2**32 - 1

Keys = Literal["token", "position", "both"]


def place_keys(k_BTHK: Tensor, first: int, keys: Keys) -> Tensor:
    """Return the keys of tokens at positions from `first` on, or those of the positions, or the sum of unit vectors."""
    if keys == "token":
        return k_BTHK
    positions_T = torch.arange(first, first + k_BTHK.shape[1], device=k_BTHK.device)
    hashed_THK = hashed_keys(positions_T, *k_BTHK.shape[2:]).to(k_BTHK.dtype)
    return hashed_THK.expand_as(k_BTHK) if keys == "position" else normalize(k_BTHK, dim=-1) + hashed_THK


def hashed_keys(positions_T: Tensor, heads: int, width: int) -> Tensor:
    """Return a pseudorandom unit vector for each position and head, [T, H, K]: K signs over sqrt(K).

    Two of them have a cosine of about 1 / sqrt(K). A function of the position alone, without a table: rows may have any
    length.
    """
    channels = torch.arange(heads * width, device=positions_T.device)
    bits: Tensor = _mix(positions_T[:, None] * (heads * width) + channels) & 1
    signs: Tensor = (2.0 * bits - 1) * width**-0.5
    return signs.view(-1, heads, width)


def _mix(x: Tensor) -> Tensor:
    # lowbias32, an integer hash of 32 bits: https://nullprogram.com/blog/2018/07/31
    x = x & MASK
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & MASK
    return x ^ (x >> 16)
