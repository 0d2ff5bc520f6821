"""What a key holds beside the token: the position, or a place in a bank of keys.

Shapes: B batch, T positions, H heads, K key width.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from lightning_modules.mixers.key_bank import Bank
from lightning_modules.mixers.rotary import rotate

MASK = 2**32 - 1

Keys = Literal["token", "position", "both"]


class KeyPlaces(nn.Module):
    """Turns queries and keys of tokens into those of the delta rule.

    Args:
        keys: `token` keeps the keys of tokens, `position` takes `hashed_keys` of positions instead, and `both` adds the
            two as unit vectors.
        rotary: Rotary positions in queries and keys of tokens.
        bank: Keys of markers; they take the place of all other keys of those positions.
    """

    def __init__(self, keys: Keys, rotary: bool, bank: Bank | None):
        super().__init__()
        self.keys, self.rotary, self.bank = keys, rotary, bank

    def forward(self, q_BTHK: Tensor, k_BTHK: Tensor, first: int, seen_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys, and the number of markers that each row has had after them.

        Args:
            q_BTHK: Queries of tokens.
            k_BTHK: Keys of tokens.
            first: The first position.
            seen_B: Markers in each row before it.
        """
        positions_T = torch.arange(first, first + k_BTHK.shape[1], device=k_BTHK.device)
        if self.rotary:
            q_BTHK, k_BTHK = (rotate(x, positions_T) for x in (q_BTHK, k_BTHK))
        if self.keys != "token":
            hashed_THK = hashed_keys(positions_T, *k_BTHK.shape[2:]).to(k_BTHK.dtype)
            added = self.keys == "both"
            k_BTHK = normalize(k_BTHK, dim=-1) + hashed_THK if added else hashed_THK.expand_as(k_BTHK)
        if self.bank is not None:
            k_BTHK, seen_B = self.bank(k_BTHK, seen_B)
        return q_BTHK, k_BTHK, seen_B


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
