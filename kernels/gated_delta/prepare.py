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

from kernels.gated_delta.tiles import inverse, load_gate, load_tile, masked_exp2, rows_of, split, store_factors

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
    EXACT: tl.constexpr = "tf32" if PARTS == 1 else "tf32x3"
    SQUARES: tl.constexpr = 2 if PARTS == 2 else 1
    S: tl.constexpr = 32  # the inverse of a chunk of 64 is made of two of 32
    slot = (tl.program_id(0) // J).to(tl.int64)
    j = tl.program_id(0) % J
    h = j // (J // H)
    row, left = rows_of(slot, cu_seqlens, N, T, C, PACKED)
    if left <= 0:
        return
    i = tl.arange(0, S)
    at = slot * J + j
    corner = i[:, None] * C + i[None, :]
    earlier = i[:, None] > i[None, :]
    A += at * SQUARES * C * C + corner
    P += at * C * C + corner
    q += (row * H + h) * K
    k += (row * H + h) * K
    g += j
    beta += j

    g_0 = tl.maximum(load_gate(g, row, left, J, S), FLOOR) * LOG2_E
    beta_0 = load_gate(beta, row, left, J, S)
    c_0, last = _log_decays(g_0, 0.0, left)
    if C == 2 * S:
        g_1 = tl.maximum(load_gate(g, row + S, left - S, J, S), FLOOR) * LOG2_E
        beta_1 = load_gate(beta, row + S, left - S, J, S)
        c_1, last = _log_decays(g_1, last, left - S)
    W: tl.constexpr = min(BK, 64)
    kk_00 = tl.zeros([S, S], tl.float32)
    kk_10 = tl.zeros([S, S], tl.float32)
    kk_11 = tl.zeros([S, S], tl.float32)
    qk_00 = tl.zeros([S, S], tl.float32)
    qk_10 = tl.zeros([S, S], tl.float32)
    qk_11 = tl.zeros([S, S], tl.float32)
    qq_00 = tl.zeros([S, S], tl.float32)
    qq_11 = tl.zeros([S, S], tl.float32)
    for column in range(0, K, W):
        q_0 = load_tile(q, 0, left, column, H * K, K, S, W)
        k_0 = load_tile(k, 0, left, column, H * K, K, S, W)
        kk_00 = tl.dot(k_0, tl.trans(k_0), kk_00, input_precision=PRECISION)
        qk_00 = tl.dot(q_0, tl.trans(k_0), qk_00, input_precision=PRECISION)
        if NORM:
            qq_00 = tl.dot(q_0, tl.trans(q_0), qq_00, input_precision=PRECISION)
        if C == 2 * S:
            q_1 = load_tile(q, S, left - S, column, H * K, K, S, W)
            k_1 = load_tile(k, S, left - S, column, H * K, K, S, W)
            kk_10 = tl.dot(k_1, tl.trans(k_0), kk_10, input_precision=PRECISION)
            kk_11 = tl.dot(k_1, tl.trans(k_1), kk_11, input_precision=PRECISION)
            qk_10 = tl.dot(q_1, tl.trans(k_0), qk_10, input_precision=PRECISION)
            qk_11 = tl.dot(q_1, tl.trans(k_1), qk_11, input_precision=PRECISION)
            if NORM:
                qq_11 = tl.dot(q_1, tl.trans(q_1), qq_11, input_precision=PRECISION)

    type = P.dtype.element_ty
    norm_q_0 = _norm_factor(qq_00, NORM, EPSILON)
    norm_k_0 = _norm_factor(kk_00, NORM, EPSILON)
    beta_k_0 = beta_0 * norm_k_0
    store_factors(factors, at, i, c_0, norm_q_0, norm_k_0, beta_k_0, last, scale, C)
    decay = masked_exp2(c_0[:, None] - c_0[None, :], i[:, None] >= i[None, :]) * beta_k_0[None, :]
    tl.store(P, (qk_00 * decay * (norm_q_0 * scale)[:, None]).to(type))
    m_00 = tl.where(earlier, kk_00 * decay * norm_k_0[:, None], 0.0)
    if C == 2 * S:
        norm_q_1 = _norm_factor(qq_11, NORM, EPSILON)
        norm_k_1 = _norm_factor(kk_11, NORM, EPSILON)
        beta_k_1 = beta_1 * norm_k_1
        store_factors(factors, at, S + i, c_1, norm_q_1, norm_k_1, beta_k_1, last, scale, C)
        decay = masked_exp2(c_1[:, None] - c_1[None, :], i[:, None] >= i[None, :]) * beta_k_1[None, :]
        tl.store(P + S * C + S, (qk_11 * decay * (norm_q_1 * scale)[:, None]).to(type))
        m_11 = tl.where(earlier, kk_11 * decay * norm_k_1[:, None], 0.0)
        decay = tl.exp2(c_1[:, None] - c_0[None, :]) * beta_k_0[None, :]
        tl.store(P + S * C, (qk_10 * decay * (norm_q_1 * scale)[:, None]).to(type))
        tl.store(P + S, tl.zeros([S, S], type))
        m_10 = kk_10 * decay * norm_k_1[:, None]

    a_00 = inverse(m_00, S, 5, PARTS)
    _store_parts(A, a_00, C, PARTS)
    if C == 2 * S:
        a_11 = inverse(m_11, S, 5, PARTS)
        a_10 = tl.dot(a_11, m_10, input_precision=EXACT)
        a_10 = tl.dot(a_10, a_00, input_precision=EXACT)
        _store_parts(A + S, tl.zeros([S, S], tl.float32), C, PARTS)
        _store_parts(A + S * C, -a_10, C, PARTS)
        _store_parts(A + S * C + S, a_11, C, PARTS)


@triton.jit
def _log_decays(g, before, left):
    """Return c, which goes on from `before`, and c of the last of the `left` positions that exist.

    Positions behind that one repeat its c bit for bit. A sum over them would not: its order of additions differs by
    position, and what the last position writes would decay by the rounding.
    """
    i = tl.arange(0, g.shape[0])
    end = tl.minimum(left, g.shape[0]) - 1
    c = before + tl.cumsum(g, 0)
    last = tl.where(end < 0, before, tl.sum(tl.where(i == end, c, 0.0), 0))
    return tl.where(i < end, c, last), last


@triton.jit
def _store_parts(at, a, C: tl.constexpr, PARTS: tl.constexpr):
    if PARTS == 2:
        high, low = split(a, at.dtype.element_ty)
        tl.store(at, high)
        tl.store(at + C * C, low)
    else:
        tl.store(at, a.to(at.dtype.element_ty))


@triton.jit
def _norm_factor(squares, NORM: tl.constexpr, EPSILON: tl.constexpr):
    """Return 1 / |x| of the rows of x, from x x^T."""
    i = tl.arange(0, squares.shape[0])
    if NORM:
        return tl.rsqrt(tl.sum(tl.where(i[:, None] == i[None, :], squares, 0.0), 1) + EPSILON)
    else:
        return tl.full([squares.shape[0]], 1.0, tl.float32)
