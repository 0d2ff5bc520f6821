"""Noise that depends on a number of its row alone: not on the batch, the rank, the device or the order of calls.

The generators of torch draw a tensor in the order of memory, so noise of a row would depend on the rows beside it. A
counter-based generator has no such order (Salmon et al. 2011). This one is the finaliser of splitmix64 (Steele et al.
2014) on integers that wrap around.

Shapes: B batch, S source positions, N values of a row.
"""

import math

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # as signed integers of 64 bits
FIRST, SECOND = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64
BITS = 24  # of a uniform value, as in a float of 32 bits


def mixed(x: Tensor) -> Tensor:
    """Return integers of 64 bits whose bits each depend on all bits of x."""
    x = (x ^ _shifted(x, 30)) * FIRST
    x = (x ^ _shifted(x, 27)) * SECOND
    return x ^ _shifted(x, 31)


def _shifted(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # torch shifts the sign in


def row_seeds(tokens_BS: Tensor, mask_BS: Tensor, drawn: bool) -> Tensor:
    """Return seed_B, a number of the tokens of each row and their order, without the padding.

    Args:
        tokens_BS: The tokens.
        mask_BS: True at real ones.
        drawn: Add a number that is drawn anew in each call, the same one for all rows.
    """
    place_S = torch.arange(1, tokens_BS.shape[1] + 1, device=tokens_BS.device)
    seed_B = (mixed(tokens_BS + place_S * GOLDEN) * mask_BS).sum(1)
    return seed_B + torch.randint(2**62, (1,), device=seed_B.device) if drawn else seed_B


def uniform(seed_B: Tensor, count: int) -> Tensor:
    """Return values_BN in (0, 1)."""
    counter_N = torch.arange(1, count + 1, device=seed_B.device) * GOLDEN
    bits_BN = _shifted(mixed(mixed(seed_B)[:, None] + counter_N), 64 - BITS)
    return (bits_BN.double() + 0.5).mul(2.0**-BITS).float().clamp(2.0**-26, 1 - 2.0**-24)


def gaussian(seed_B: Tensor, count: int) -> Tensor:
    """Return values_BN of a standard normal distribution (Box and Muller 1958)."""
    size_BN, angle_BN = uniform(seed_B, 2 * count).chunk(2, dim=1)
    return (-2 * size_BN.log()).sqrt() * (2 * math.pi * angle_BN).cos()
