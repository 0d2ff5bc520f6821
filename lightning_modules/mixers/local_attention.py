"""Causal attention to the last W positions: by FlashAttention, or with a mask over all pairs or over blocks.

Shapes: B batch, T positions, H heads, K head width, W window, C <= W positions before the first query, S = C + T keys.
Of blocks: M = B H, N blocks, L >= W queries of a block, J = 2 L keys that they are multiplied with.
"""

from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad, scaled_dot_product_attention

from lightning_modules.core.ensemble import member_call

Attend = Callable[[Tensor, Tensor, Tensor, int], Tensor]

ALIGNMENT = 8  # fused kernels on a GPU take masks whose rows are a multiple of this
SMALLEST = 16  # queries of a block
LONG_FOR_BLOCKS = 8  # blocks are faster than all pairs from rows of so many blocks on
LONG_FOR_FLASH = 512  # FlashAttention is the fastest from so many keys on
WIDEST = 256  # the largest head width that FlashAttention takes


def choose(q_BTHK: Tensor, keys: int, window: int) -> Attend:
    """Return the fastest function for queries, S keys and a window, by `benchmarks/window_attention.py`."""
    if keys >= LONG_FOR_FLASH and takes_flash(q_BTHK):
        return attend_flash
    return attend_blocks if keys >= LONG_FOR_BLOCKS * _block(window) else attend_masked


def takes_flash(q_BTHK: Tensor) -> bool:
    """Return whether FlashAttention runs: on a GPU from Ampere on, in 16 bits, and not for an ensemble."""
    width, fits = q_BTHK.shape[-1], q_BTHK.dtype in (torch.bfloat16, torch.float16)
    if not (q_BTHK.is_cuda and fits and width % ALIGNMENT == 0 and width <= WIDEST) or member_call():
        return False
    return torch.cuda.get_device_capability(q_BTHK.device) >= (8, 0)


def attend_flash(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, window: int) -> Tensor:
    """Return what the queries read, [B, T, H, K], by a kernel that skips keys outside of the window."""
    (B, T), S = q_BTHK.shape[:2], k_BSHK.shape[1]
    rows_B = torch.arange(B + 1, dtype=torch.int32, device=q_BTHK.device)
    q, k, v = (x.flatten(0, 1) for x in (q_BTHK, k_BSHK, v_BSHK))
    read = varlen_attn(q, k, v, rows_B * T, rows_B * S, T, S, window_size=(window - 1, 0))
    assert isinstance(read, Tensor)
    return read.view_as(q_BTHK)


def attend_masked(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, window: int) -> Tensor:
    """Return the same from the products of all queries with all keys."""
    mask_TS = seen(q_BTHK.shape[1], k_BSHK.shape[1], window, q_BTHK.device)
    q_BHTK, k_BHSK, v_BHSK = (x.transpose(1, 2) for x in (q_BTHK, k_BSHK, v_BSHK))
    return _attend(q_BHTK, k_BHSK, v_BHSK, mask_TS).transpose(1, 2)


def attend_blocks(q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor, window: int) -> Tensor:
    """Return the same from the products of each block of queries with the keys of the block and of the block before."""
    B, T, H, K = q_BTHK.shape
    size, past = _block(window), k_BSHK.shape[1] - T
    blocks = -(-T // size)
    q_MTK, k_MSK, v_MSK = (x.transpose(1, 2).flatten(0, 1) for x in (q_BTHK, k_BSHK, v_BSHK))
    q_MNLK = pad(q_MTK, (0, 0, 0, blocks * size - T)).reshape(B * H, blocks, size, K)
    k_MNJK, v_MNJK = (
        pad(x, (0, 0, size - past, blocks * size - T)).unfold(1, 2 * size, size).mT for x in (k_MSK, v_MSK)
    )
    # Keys before the first one are zeros. Queries after the last one see themselves, so no softmax is over nothing.
    key_NJ = torch.arange(blocks, device=q_BTHK.device)[:, None] * size + torch.arange(2 * size, device=q_BTHK.device)
    mask_NLJ = seen(size, 2 * size, window, q_BTHK.device) & (key_NJ >= size - past)[:, None]
    read_MNLK = _attend(q_MNLK, k_MNJK, v_MNJK, mask_NLJ)
    return read_MNLK.reshape(B, H, -1, K)[:, :, :T].transpose(1, 2)


def seen(queries: int, keys: int, window: int, device: torch.device) -> Tensor:
    """Return the mask [T, S] that is True where a query sees a key; the last query is at the position of the last key.

    A query sees keys at a distance of 0 to W - 1.
    """
    distance_TS = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    return (distance_TS >= 0) & (distance_TS < window)


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    # vmap's rule for the fused kernels of a GPU does not repeat a mask that all members of an ensemble share
    with sdpa_kernel(SDPBackend.MATH) if q.is_cuda and member_call() else nullcontext():
        return scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _block(window: int) -> int:
    return max(SMALLEST, -(-window // ALIGNMENT) * ALIGNMENT)
