"""Ways to make the keys of items, all of them unit vectors.

Shapes: S ensemble members, B rows, N items, W tokens of a context, K key width, F = K / 2 frequencies.
"""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn.functional import normalize, silu

from datamodules.memory_items import MemoryBatch
from lightning_modules.mixers.keys import hashed_keys
from lightning_modules.mixers.rotary import BASE, rotate

ItemKeys = Literal[
    "token",
    "marker",
    "orthogonal",
    "alike",
    "hashed",
    "sinusoidal",
    "rotary",
    "context",
    "marker_context",
    "short_convolution",
]
OF_CONTEXT = ("token", "context", "marker_context", "short_convolution")  # a query's context may differ from the item's
WITH_STRENGTH = ("alike", "sinusoidal")
OF_POSITION = ("hashed", "sinusoidal", "rotary")
assert {*OF_CONTEXT, *WITH_STRENGTH, *OF_POSITION} < set(get_args(ItemKeys))


def make_keys(kind: ItemKeys, batch: MemoryBatch, context_SBNWK: Tensor, strength: float, spacing: int) -> Tensor:
    """Return the key of each item, [S, B, N, K]; see `DeltaMemory` for the kinds and the arguments."""
    token_SBNK = context_SBNWK[..., -1, :]
    marker_SB1K = normalize(token_SBNK[:, :, :1], dim=-1)
    step_N = spacing * torch.arange(token_SBNK.shape[2], device=token_SBNK.device)
    match kind:
        case "token":
            key_SBNK = token_SBNK
        case "marker":
            key_SBNK = marker_SB1K.expand_as(token_SBNK)
        case "orthogonal":
            key_SBNK = orthogonal(token_SBNK)
        case "alike":
            # The common direction is a second draw: a token's would lie within the span of the orthogonal keys
            common_SB1K = normalize(batch["noise_SBNWK"][:, :, :1, -1], dim=-1)
            key_SBNK = (1 - strength) * orthogonal(token_SBNK) + strength * common_SB1K
        case "hashed":
            place_SBN = batch["first_SB"][..., None] + step_N
            key_SBNK = hashed_keys(place_SBN.flatten(), 1, token_SBNK.shape[-1]).view_as(token_SBNK)
        case "sinusoidal":
            key_SBNK = marker_SB1K + strength * sinusoids(step_N, token_SBNK.shape[-1])
        case "rotary":
            key_SBNK = rotate(marker_SB1K.expand_as(token_SBNK)[..., None, :], step_N)[..., 0, :]
        case "context" | "marker_context" | "short_convolution":
            key_SBNK = _convolved(kind, batch["kernel_SBWK"], context_SBNWK)
    return normalize(key_SBNK, dim=-1)


def orthogonal(token_SBNK: Tensor) -> Tensor:
    """Return keys from a bank of orthonormal vectors, one after the other, from the first again after the K-th."""
    count, width = token_SBNK.shape[-2:]
    bank_SBMK: Tensor = torch.linalg.qr(token_SBNK[:, :, :width].mT).Q.mT
    return bank_SBMK[:, :, torch.arange(count, device=token_SBNK.device) % width]


def sinusoids(position_N: Tensor, width: int) -> Tensor:
    """Return sines and cosines of the positions in turn, [N, K], at the frequencies 10000^(-2i/K) (Vaswani et al.)."""
    frequency_F = BASE ** (-torch.arange(0, width, 2, device=position_N.device, dtype=torch.float32) / width)
    angle_NF = position_N[:, None] * frequency_F
    return torch.stack([angle_NF.sin(), angle_NF.cos()], -1).flatten(1)


def _convolved(kind: str, kernel_SBWK: Tensor, context_SBNWK: Tensor) -> Tensor:
    if kind != "context":
        marker_SB1K = context_SBNWK[:, :, :1, -1]
        marked_SBN1K = marker_SB1K[..., None, :].expand_as(context_SBNWK[..., -1:, :])
        context_SBNWK = torch.cat([context_SBNWK[..., :-1, :], marked_SBN1K], -2)
    key_SBNK = (kernel_SBWK[:, :, None] * context_SBNWK).sum(-2)
    return silu(key_SBNK) if kind == "short_convolution" else key_SBNK
