# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""The first kernel of the forward: what each chunk can compute alone.

That is the inverse A = (I + strict(K K^T o G) diag(beta))^-1, the decayed products P = scale tril(Q K^T o G) diag(beta)
of queries and keys, and a row of each factor of `tiles.py`. Normalised queries and keys are never stored: the factors
scale rows and columns of the products instead, which rounds less and lets tiles go from memory to the tensor cores
untouched.

A chunk is cut into blocks of S = 16 positions. A and P are made of the blocks on the diagonal, then of what stands
between two neighbours, then, where C is 64, of what stands between two pairs. So no product has a zero block.

Shapes: as in `reference.py`; C positions of a chunk; B blocks of S or R positions; BK and BV columns of a tile, W of
them at once. Per slot and value head: A [C, C], twice where PARTS is 2, P [C, C], factors [6, C].
"""

import triton
import triton.language as tl

from kernels.gated_delta.blocks import above, beside, halves, inverse, load_blocks, store_blocks
from kernels.gated_delta.tiles import load_gate, masked_exp2, rows_of, store_factors

S = tl.constexpr(16)  # the smallest block of a product on tensor cores
LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["N", "T"])
def prepare_chunks(
    q,
    k,
    g,
    beta,
    A,
    P,
    factors,
    cu_seqlens,
    N,
    T,
    scale,
    H: tl.constexpr,
    J: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    NORM: tl.constexpr,
    PACKED: tl.constexpr,
    EPSILON: tl.constexpr,
    FLOOR: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Compute A, P and the factors; one program per slot and value head."""
    PRECISION: tl.constexpr = "tf32x3" if PARTS == 0 else "tf32"
    B: tl.constexpr = C // S
    STRIDE: tl.constexpr = H * K
    W: tl.constexpr = min(BK, 64)
    slot = (tl.program_id(0) // J).to(tl.int64)
    j = tl.program_id(0) % J
    h = j // (J // H)
    row, left = rows_of(slot, cu_seqlens, N, T, C, PACKED)
    if left <= 0:
        return
    at = slot * J + j
    A += at * (2 if PARTS == 2 else 1) * C * C
    P += at * C * C
    q += (row * H + h) * K
    k += (row * H + h) * K

    c_C, last = _log_decays(tl.maximum(load_gate(g + j, row, left, J, C), FLOOR) * LOG2_E, left)
    beta_C = load_gate(beta + j, row, left, J, C)
    kk_BSS = tl.zeros([B, S, S], tl.float32)
    qk_BSS = tl.zeros([B, S, S], tl.float32)
    qq_BSS = tl.zeros([B, S, S], tl.float32)
    for column in range(0, K, W):
        q_BSW = load_blocks(q, 0, left, column, STRIDE, K, B, S, S, W)
        k_BSW = load_blocks(k, 0, left, column, STRIDE, K, B, S, S, W)
        k_BWS = tl.trans(k_BSW, 0, 2, 1)
        kk_BSS = tl.dot(k_BSW, k_BWS, kk_BSS, input_precision=PRECISION)
        qk_BSS = tl.dot(q_BSW, k_BWS, qk_BSS, input_precision=PRECISION)
        if NORM:
            qq_BSS = tl.dot(q_BSW, tl.trans(q_BSW, 0, 2, 1), qq_BSS, input_precision=PRECISION)
    c_BS = tl.reshape(c_C, [B, S])
    norm_q_BS = _norm_factor(qq_BSS, NORM, EPSILON)
    norm_k_BS = _norm_factor(kk_BSS, NORM, EPSILON)
    beta_k_BS = tl.reshape(beta_C, [B, S]) * norm_k_BS
    position_BS = tl.arange(0, B)[:, None] * S + tl.arange(0, S)[None, :]
    store_factors(factors, at, position_BS, c_BS, norm_q_BS, norm_k_BS, beta_k_BS, last, scale, C)
    norm_q_BS *= scale

    i = tl.arange(0, S)[None, :, None]
    j = tl.arange(0, S)[None, None, :]
    decay_BSS = masked_exp2(c_BS[:, :, None] - c_BS[:, None, :], i >= j) * beta_k_BS[:, None, :]
    store_blocks(P, qk_BSS * decay_BSS * norm_q_BS[:, :, None], 0, 0, C, 1)
    a_BSS = inverse(tl.where(i > j, kk_BSS * decay_BSS * norm_k_BS[:, :, None], 0.0), S, 4, PARTS)
    store_blocks(A, a_BSS, 0, 0, C, PARTS)
    # fmt: off
    a = _join(
        q, k, A, P, a_BSS, c_BS, norm_q_BS, norm_k_BS, beta_k_BS, left, STRIDE, K, W, C, S, PRECISION, PARTS
    )
    if C == 4 * S:
        _join(
            q, k, A, P, a, c_BS, norm_q_BS, norm_k_BS, beta_k_BS, left, STRIDE, K, W, C, 2 * S, PRECISION, PARTS
        )
    # fmt: on


@triton.jit
def _join(
    q,
    k,
    A,
    P,
    a,
    c,
    norm_q,
    norm_k,
    beta_k,
    left,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    W: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    PRECISION: tl.constexpr,
    PARTS: tl.constexpr,
):
    """Store what A and P have between neighbouring blocks of R positions, and return the inverses of such pairs.

    a: The inverses of the blocks. The other vectors have a number per position, in any shape; norm_q is times scale.
    """
    EXACT: tl.constexpr = "tf32" if PARTS == 1 else "tf32x3"
    B: tl.constexpr = C // (2 * R)
    kk_BRR = tl.zeros([B, R, R], tl.float32)
    qk_BRR = tl.zeros([B, R, R], tl.float32)
    for column in range(0, K, W):
        q_BRW = load_blocks(q, R, left, column, STRIDE, K, B, 2 * R, R, W)
        k_BRW = load_blocks(k, R, left, column, STRIDE, K, B, 2 * R, R, W)
        earlier_BWR = tl.trans(load_blocks(k, 0, left, column, STRIDE, K, B, 2 * R, R, W), 0, 2, 1)
        kk_BRR = tl.dot(k_BRW, earlier_BWR, kk_BRR, input_precision=PRECISION)
        qk_BRR = tl.dot(q_BRW, earlier_BWR, qk_BRR, input_precision=PRECISION)
    c_first, c_second = halves(c, R)
    beta_k_first, _ = halves(beta_k, R)
    _, norm_q_second = halves(norm_q, R)
    _, norm_k_second = halves(norm_k, R)
    decay_BRR = tl.exp2(c_second[:, :, None] - c_first[:, None, :]) * beta_k_first[:, None, :]
    zeros_BRR = tl.zeros([B, R, R], tl.float32)
    store_blocks(P, qk_BRR * decay_BRR * norm_q_second[:, :, None], R, 0, C, 1)
    store_blocks(P, zeros_BRR, 0, R, C, 1)
    m_BRR = kk_BRR * decay_BRR * norm_k_second[:, :, None]
    a_first, a_second = halves(a, R)
    a_between = -tl.dot(tl.dot(a_second, m_BRR, input_precision=EXACT), a_first, input_precision=EXACT)
    store_blocks(A, a_between, R, 0, C, PARTS)
    store_blocks(A, zeros_BRR, 0, R, C, PARTS)
    return above(beside(a_first, zeros_BRR), beside(a_between, a_second))


@triton.jit
def _log_decays(g, left):
    """Return c, and c of the last of the `left` positions that exist.

    Positions behind that one repeat its c bit for bit. A sum over them would not: its order of additions differs by
    position, and what the last position writes would decay by the rounding.
    """
    i = tl.arange(0, g.shape[0])
    end = tl.minimum(left, g.shape[0]) - 1
    c = tl.cumsum(g, 0)
    last = tl.sum(tl.where(i == end, c, 0.0), 0)
    return tl.where(i < end, c, last), last


@triton.jit
def _norm_factor(squares, NORM: tl.constexpr, EPSILON: tl.constexpr):
    """Return 1 / |x| of the rows of each block x, from its x x^T."""
    i = tl.arange(0, squares.shape[1])
    if NORM:
        own = (i[:, None] == i[None, :])[None, :, :]
        return tl.rsqrt(tl.sum(tl.where(own, squares, 0.0), 2) + EPSILON)
    else:
        return tl.full([squares.shape[0], squares.shape[1]], 1.0, tl.float32)
