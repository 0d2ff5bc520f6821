# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""The first kernel of the forward: what each chunk can compute alone.

That is the inverse A = (I + strict(K K^T o G) diag(beta))^-1, the decayed products P = scale tril(Q K^T o G) diag(beta)
of queries and keys, and a row of each factor of `tiles.py`. Normalised queries and keys are never stored: the factors
scale rows and columns of the products instead, which rounds less and lets tiles go from memory to the tensor cores
untouched.

Shapes: as in `reference.py`; C positions of a chunk, BK and BV columns of a tile, S half a chunk or a whole one. Per
slot: A [C, C], twice where PARTS is 2, P [C, C], factors [6, C].
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
    A += at * SQUARES * C * C + corner
    P += at * C * C + corner
    q += (row * H + h) * K
    k += (row * H + h) * K
    g += j
    beta += j

    g_0 = tl.maximum(load_gate(g, row, left, J, S), FLOOR) * LOG2_E
    beta_0 = load_gate(beta, row, left, J, S)
    c_0 = tl.cumsum(g_0, 0)
    last = tl.sum(g_0, 0)
    if C == 2 * S:
        q_1 = q + S * H * K
        k_1 = k + S * H * K
        g_1 = tl.maximum(load_gate(g, row + S, left - S, J, S), FLOOR) * LOG2_E
        beta_1 = load_gate(beta, row + S, left - S, J, S)
        c_1 = last + tl.cumsum(g_1, 0)
        last += tl.sum(g_1, 0)

    kk_00 = _products(k, k, left, left, H * K, K, BK, S, PRECISION)
    r_0 = _norm_factor(kk_00, NORM, EPSILON)
    write_0 = r_0 * beta_0
    a_00 = inverse(kk_00 * _decay(c_0, 1) * (r_0[:, None] * write_0[None, :]), S, 5, PARTS)
    _store_parts(A, a_00, C, PARTS)
    if C == 2 * S:
        kk_11 = _products(k_1, k_1, left - S, left - S, H * K, K, BK, S, PRECISION)
        r_1 = _norm_factor(kk_11, NORM, EPSILON)
        write_1 = r_1 * beta_1
        a_11 = inverse(kk_11 * _decay(c_1, 1) * (r_1[:, None] * write_1[None, :]), S, 5, PARTS)
        _store_parts(A + S * C + S, a_11, C, PARTS)
        kk_10 = _products(k_1, k, left - S, left, H * K, K, BK, S, PRECISION)
        kk_10 *= tl.exp2(c_1[:, None] - c_0[None, :]) * (r_1[:, None] * write_0[None, :])
        kk_10 = tl.dot(a_11, kk_10, input_precision=EXACT)
        _store_parts(A + S * C, -tl.dot(kk_10, a_00, input_precision=EXACT), C, PARTS)
        _store_parts(A + S, tl.zeros([S, S], tl.float32), C, PARTS)

    type = P.dtype.element_ty
    s_0 = _norm_factor(_products(q, q, left, left, H * K, K, BK, S, PRECISION), NORM, EPSILON)
    store_factors(factors, at, i, c_0, s_0, r_0, write_0, last, scale, C)
    qk_00 = _products(q, k, left, left, H * K, K, BK, S, PRECISION)
    tl.store(P, (qk_00 * _decay(c_0, 0) * (s_0[:, None] * (write_0 * scale)[None, :])).to(type))
    if C == 2 * S:
        s_1 = _norm_factor(_products(q_1, q_1, left - S, left - S, H * K, K, BK, S, PRECISION), NORM, EPSILON)
        store_factors(factors, at, S + i, c_1, s_1, r_1, write_1, last, scale, C)
        qk_11 = _products(q_1, k_1, left - S, left - S, H * K, K, BK, S, PRECISION)
        qk_11 *= _decay(c_1, 0) * (s_1[:, None] * (write_1 * scale)[None, :])
        tl.store(P + S * C + S, qk_11.to(type))
        qk_10 = _products(q_1, k, left - S, left, H * K, K, BK, S, PRECISION)
        qk_10 *= tl.exp2(c_1[:, None] - c_0[None, :]) * (s_1[:, None] * (write_0 * scale)[None, :])
        tl.store(P + S * C, qk_10.to(type))
        tl.store(P + S, tl.zeros([S, S], type))


@triton.jit
def _products(
    x,
    y,
    left_x,
    left_y,
    STRIDE: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    S: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Return x y^T for S rows of each; a loop over columns, since whole rows need too many registers."""
    W: tl.constexpr = min(BK, 64)
    products = tl.zeros([S, S], tl.float32)
    for column in range(0, K, W):
        x_SW = load_tile(x, 0, left_x, column, STRIDE, K, S, W)
        y_SW = load_tile(y, 0, left_y, column, STRIDE, K, S, W)
        products = tl.dot(x_SW, tl.trans(y_SW), products, input_precision=PRECISION)
    return products


@triton.jit
def _decay(c, LEAST: tl.constexpr):
    """Return the decay from each position of a block to each of the same block, 0 to one less than LEAST later."""
    i = tl.arange(0, c.shape[0])
    return masked_exp2(c[:, None] - c[None, :], i[:, None] >= i[None, :] + LEAST)


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
