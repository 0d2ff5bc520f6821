# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""The first kernel of the forward: what each chunk can compute alone.

That is the inverse A = (I + strict(K K^T o G) diag(beta))^-1, the decayed products P = scale tril(Q K^T o G) diag(beta)
of queries and keys, and a row of each factor of `tiles.py`. Normalised queries and keys are never stored: the factors
scale rows and columns of the products instead, which rounds less and lets tiles go from memory to the tensor cores
untouched.

Shapes: as in `reference.py`; C positions of a chunk, in halves of S = 32 where C is 64; BK and BV columns of a tile.
Per slot and value head: A [C, C], twice where PARTS is 2, P [C, C], factors [6, C].
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
    c = tl.reshape(c_C, [B, S])
    norm_q = _norm_factor(qq_BSS, NORM, EPSILON)
    norm_k = _norm_factor(kk_BSS, NORM, EPSILON)
    beta_k = tl.reshape(beta_C, [B, S]) * norm_k
    position = tl.arange(0, B)[:, None] * S + tl.arange(0, S)[None, :]
    store_factors(factors, at, position, c, norm_q, norm_k, beta_k, last, scale, C)
    norm_q *= scale

    i = tl.arange(0, S)[None, :, None]
    j = tl.arange(0, S)[None, None, :]
    decay_BSS = masked_exp2(c[:, :, None] - c[:, None, :], i >= j) * beta_k[:, None, :]
    store_blocks(P, qk_BSS * decay_BSS * norm_q[:, :, None], 0, 0, C, 1)
    a_BSS = inverse(tl.where(i > j, kk_BSS * decay_BSS * norm_k[:, :, None], 0.0), S, 4, PARTS)
    store_blocks(A, a_BSS, 0, 0, C, PARTS)
    # fmt: off
    first, second, corner = _join(
        q, k, A, P, a_BSS, c, norm_q, norm_k, beta_k, left, STRIDE, K, W, C, S, PRECISION, PARTS
    )
    if C == 4 * S:
        zeros = tl.zeros(corner.shape, tl.float32)
        a = above(beside(first, zeros), beside(corner, second))
        c, norm_q, norm_k, beta_k = (
            tl.reshape(c, [2, 2 * S]), tl.reshape(norm_q, [2, 2 * S]), tl.reshape(norm_k, [2, 2 * S]),
            tl.reshape(beta_k, [2, 2 * S]),
        )
        _join(q, k, A, P, a, c, norm_q, norm_k, beta_k, left, STRIDE, K, W, C, 2 * S, PRECISION, PARTS)
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
    """Store what A and P have between neighbouring blocks of R positions, whose own inverses are `a`.

    Return the inverses of each pair's first and second block, and what A has between them.
    """
    EXACT: tl.constexpr = "tf32" if PARTS == 1 else "tf32x3"
    B: tl.constexpr = C // (2 * R)
    kk = tl.zeros([B, R, R], tl.float32)
    qk = tl.zeros([B, R, R], tl.float32)
    for column in range(0, K, W):
        q_BRW = load_blocks(q, R, left, column, STRIDE, K, B, 2 * R, R, W)
        k_BRW = load_blocks(k, R, left, column, STRIDE, K, B, 2 * R, R, W)
        k_BWR = tl.trans(load_blocks(k, 0, left, column, STRIDE, K, B, 2 * R, R, W), 0, 2, 1)
        kk = tl.dot(k_BRW, k_BWR, kk, input_precision=PRECISION)
        qk = tl.dot(q_BRW, k_BWR, qk, input_precision=PRECISION)
    c_first, c_second = halves(c)
    decay = tl.exp2(c_second[:, :, None] - c_first[:, None, :]) * halves(beta_k)[0][:, None, :]
    store_blocks(P, qk * decay * halves(norm_q)[1][:, :, None], R, 0, C, 1)
    store_blocks(P, tl.zeros(qk.shape, tl.float32), 0, R, C, 1)
    m = kk * decay * halves(norm_k)[1][:, :, None]
    a_first, a_second = halves(a)
    corner = -tl.dot(tl.dot(a_second, m, input_precision=EXACT), a_first, input_precision=EXACT)
    store_blocks(A, corner, R, 0, C, PARTS)
    store_blocks(A, tl.zeros(corner.shape, tl.float32), 0, R, C, PARTS)
    return a_first, a_second, corner


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
