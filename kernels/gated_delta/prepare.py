# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""The first kernel of the forward: what each chunk can compute alone.

That is the inverse A = (I + strict(K K^T o G) diag(beta))^-1, the decayed products P = scale tril(Q K^T o G), the
cumulative log-decays c (stored to the base 2, so that the kernels compute exp(c) as 2^c), and the factors r of the l2
norms. Normalised queries and keys are never stored: r scales rows and columns of the products instead, which rounds
less and lets tiles go from memory to the tensor cores untouched.

Shapes: as in `reference.py`; C positions of a chunk, BK and BV columns of a tile, S half a chunk or a whole one. Per
slot: A [C, C], twice where PARTS is 2, P [C, C], c and r [C].
"""

import triton
import triton.language as tl

from kernels.gated_delta.tiles import inverse, load_gate, load_tile, masked_exp2, rows_of, split

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(do_not_specialize=["N", "T"])
def prepare_chunks(
    q,
    k,
    g,
    beta,
    A,
    P,
    c,
    r_q,
    r_k,
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
    """Compute A, P, c and the factors of the l2 norm; one program per slot and value head."""
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
    writer = NORM and j % (J // H) == 0  # of the factors, which the value heads of a group share
    A += (slot * J + j) * SQUARES * C * C
    P += (slot * J + j) * C * C
    c += (slot * J + j) * C
    r_q += (slot * H + h) * C
    r_k += (slot * H + h) * C
    corner = i[:, None] * C + i[None, :]

    k_0 = load_tile(k + h * K, row, left, 0, H * K, K, S, BK)
    r_0 = _norm_factor(k_0, NORM, EPSILON)
    if writer:
        tl.store(r_k + i, r_0)
    beta_0 = load_gate(beta + j, row, left, J, S)
    g_0 = tl.maximum(load_gate(g + j, row, left, J, S), FLOOR) * LOG2_E
    c_0 = tl.cumsum(g_0, 0)
    tl.store(c + i, c_0)
    a_00 = inverse(_decayed(k_0, k_0, c_0, c_0, r_0, r_0, 1, PRECISION) * beta_0[None, :], S, 5, PARTS)
    _store_parts(A + corner, a_00, C, PARTS)

    if C == 2 * S:
        k_1 = load_tile(k + h * K, row + S, left - S, 0, H * K, K, S, BK)
        r_1 = _norm_factor(k_1, NORM, EPSILON)
        if writer:
            tl.store(r_k + S + i, r_1)
        beta_1 = load_gate(beta + j, row + S, left - S, J, S)
        g_1 = tl.maximum(load_gate(g + j, row + S, left - S, J, S), FLOOR) * LOG2_E
        c_1 = tl.cumsum(g_1, 0) + tl.sum(g_0, 0)
        tl.store(c + S + i, c_1)
        m_10 = _decayed(k_1, k_0, c_1, c_0, r_1, r_0, None, PRECISION)
        a_11 = inverse(_decayed(k_1, k_1, c_1, c_1, r_1, r_1, 1, PRECISION) * beta_1[None, :], S, 5, PARTS)
        a_10 = tl.dot(a_11, m_10 * beta_0[None, :], input_precision=EXACT)
        a_10 = tl.dot(a_10, a_00, input_precision=EXACT)
        _store_parts(A + corner + S, tl.zeros([S, S], tl.float32), C, PARTS)
        _store_parts(A + corner + S * C, -a_10, C, PARTS)
        _store_parts(A + corner + S * C + S, a_11, C, PARTS)

    # Keys are loaded again, since registers are too few to keep them
    type = P.dtype.element_ty
    q_0 = load_tile(q + h * K, row, left, 0, H * K, K, S, BK)
    k_0 = load_tile(k + h * K, row, left, 0, H * K, K, S, BK)
    s_0 = _norm_factor(q_0, NORM, EPSILON)
    if writer:
        tl.store(r_q + i, s_0)
    tl.store(P + corner, (_decayed(q_0, k_0, c_0, c_0, s_0, r_0, 0, PRECISION) * scale).to(type))
    if C == 2 * S:
        q_1 = load_tile(q + h * K, row + S, left - S, 0, H * K, K, S, BK)
        k_1 = load_tile(k + h * K, row + S, left - S, 0, H * K, K, S, BK)
        s_1 = _norm_factor(q_1, NORM, EPSILON)
        if writer:
            tl.store(r_q + S + i, s_1)
        p_10 = _decayed(q_1, k_0, c_1, c_0, s_1, r_0, None, PRECISION)
        p_11 = _decayed(q_1, k_1, c_1, c_1, s_1, r_1, 0, PRECISION)
        tl.store(P + corner + S, tl.zeros([S, S], type))
        tl.store(P + corner + S * C, (p_10 * scale).to(type))
        tl.store(P + corner + S * C + S, (p_11 * scale).to(type))


@triton.jit
def _decayed(x, y, c_x, c_y, r_x, r_y, LEAST: tl.constexpr, PRECISION: tl.constexpr):
    """Return x y^T of normalised rows, times the decay from each position of y to each of x.

    It is 0 where x is fewer than LEAST positions after y. LEAST None: all of x come after y.
    """
    between = c_x[:, None] - c_y[None, :]
    if LEAST is None:
        decay = tl.exp2(between)
    else:
        i = tl.arange(0, x.shape[0])
        decay = masked_exp2(between, i[:, None] >= i[None, :] + LEAST)
    return tl.dot(x, tl.trans(y), input_precision=PRECISION) * decay * (r_x[:, None] * r_y[None, :])


@triton.jit
def _store_parts(at, a, C: tl.constexpr, PARTS: tl.constexpr):
    if PARTS == 2:
        high, low = split(a, at.dtype.element_ty)
        tl.store(at, high)
        tl.store(at + C * C, low)
    else:
        tl.store(at, a.to(at.dtype.element_ty))


@triton.jit
def _norm_factor(x, NORM: tl.constexpr, EPSILON: tl.constexpr):
    if NORM:
        x = x.to(tl.float32)
        return tl.rsqrt(tl.sum(x * x, 1) + EPSILON)
    else:
        return tl.full([x.shape[0]], 1.0, tl.float32)
