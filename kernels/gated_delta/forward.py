# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""The two kernels of the forward: what each chunk can do alone, and the sweep over the chunks of a sequence.

`reference.py` has the formulas. The kernels scale columns by beta: A = (I + strict(K K^T o G) diag(beta))^-1, errors
E = A (V - exp(c) K S). Normalised keys are never made: the l2 norms r scale rows and columns of the products instead,
which rounds less and lets tiles go from memory to the tensor cores untouched.

Shapes: as in `reference.py`; C positions of a chunk, BK and BV columns of a tile, S a half or the whole of a chunk.
Of each slot: A [C, C], c and r [C].
"""

import triton
import triton.language as tl

from kernels.gated_delta.tiles import first_slot, inverse, load_gate, load_tile, masked_exp, rows_of, store_tile


@triton.jit(do_not_specialize=["N", "T"])
def prepare_chunks(
    q,
    k,
    g,
    beta,
    A,
    c,
    r_q,
    r_k,
    cu_seqlens,
    N,
    T,
    H: tl.constexpr,
    J: tl.constexpr,
    K: tl.constexpr,
    BK: tl.constexpr,
    C: tl.constexpr,
    NORM: tl.constexpr,
    PACKED: tl.constexpr,
    EPSILON: tl.constexpr,
    FLOOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute c, A and the factors of the l2 norm; one program per slot and value head."""
    S: tl.constexpr = 32  # the inverse of a chunk of 64 is made of two of 32
    slot = (tl.program_id(0) // J).to(tl.int64)
    j = tl.program_id(0) % J
    h = j // (J // H)
    row, left = rows_of(slot, cu_seqlens, N, T, C, PACKED)
    if left <= 0:
        return
    i = tl.arange(0, S)
    strict = i[:, None] > i[None, :]
    A += (slot * J + j) * C * C
    c += (slot * J + j) * C
    r_q += (slot * H + h) * C
    r_k += (slot * H + h) * C
    corner = i[:, None] * C + i[None, :]

    k_0 = load_tile(k + h * K, row, left, 0, H * K, K, S, BK)
    beta_0 = load_gate(beta + j, row, left, J, S)
    g_0 = tl.maximum(load_gate(g + j, row, left, J, S), FLOOR)
    c_0 = tl.cumsum(g_0, 0)
    tl.store(c + i, c_0)
    m_00 = tl.dot(k_0, tl.trans(k_0), input_precision=PRECISION) * masked_exp(c_0[:, None] - c_0[None, :], strict)
    if NORM:
        r_0 = _norm_factor(k_0, EPSILON)
        m_00 *= r_0[:, None] * r_0[None, :]
        if j % (J // H) == 0:
            tl.store(r_k + i, r_0)
            tl.store(r_q + i, _norm_factor(load_tile(q + h * K, row, left, 0, H * K, K, S, BK), EPSILON))
    a_00 = inverse(m_00 * beta_0[None, :], S, 5, PRECISION)
    tl.store(A + corner, _finite(a_00, A.dtype.element_ty))

    if C == 2 * S:
        k_1 = load_tile(k + h * K, row + S, left - S, 0, H * K, K, S, BK)
        beta_1 = load_gate(beta + j, row + S, left - S, J, S)
        g_1 = tl.maximum(load_gate(g + j, row + S, left - S, J, S), FLOOR)
        c_1 = tl.cumsum(g_1, 0) + tl.sum(g_0, 0)
        tl.store(c + S + i, c_1)
        m_11 = tl.dot(k_1, tl.trans(k_1), input_precision=PRECISION) * masked_exp(c_1[:, None] - c_1[None, :], strict)
        m_10 = tl.dot(k_1, tl.trans(k_0), input_precision=PRECISION) * tl.exp(c_1[:, None] - c_0[None, :])
        if NORM:
            r_1 = _norm_factor(k_1, EPSILON)
            m_11 *= r_1[:, None] * r_1[None, :]
            m_10 *= r_1[:, None] * r_0[None, :]
            if j % (J // H) == 0:
                tl.store(r_k + S + i, r_1)
                q_1 = load_tile(q + h * K, row + S, left - S, 0, H * K, K, S, BK)
                tl.store(r_q + S + i, _norm_factor(q_1, EPSILON))
        a_11 = inverse(m_11 * beta_1[None, :], S, 5, PRECISION)
        a_10 = tl.dot(a_11, m_10 * beta_0[None, :], input_precision=PRECISION)
        a_10 = tl.dot(a_10, a_00, input_precision=PRECISION)
        tl.store(A + corner + S, tl.zeros([S, S], A.dtype.element_ty))
        tl.store(A + corner + S * C, _finite(-a_10, A.dtype.element_ty))
        tl.store(A + corner + S * C + S, _finite(a_11, A.dtype.element_ty))


@triton.jit
def _finite(a, type):
    if type == tl.float16:
        a = tl.clamp(a, -65504.0, 65504.0)
    return a.to(type)


@triton.jit
def _norm_factor(x, EPSILON: tl.constexpr):
    x = x.to(tl.float32)
    return tl.rsqrt(tl.sum(x * x, 1) + EPSILON)


@triton.jit
def sweep_forward(
    q,
    k,
    v,
    beta,
    A,
    c,
    r_q,
    r_k,
    initial,
    o,
    final,
    states,
    errors,
    cu_seqlens,
    n,
    j,
    column,
    T,
    scale,
    H: tl.constexpr,
    J: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    NORM: tl.constexpr,
    WIDE: tl.constexpr,
    PACKED: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    KEEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Carry BV columns of a state through a sequence; store the outputs or, with KEEP, the states and errors."""
    slot, start, length = first_slot(n, cu_seqlens, T, C, PACKED)
    h = j // (J // H)
    head = (n.to(tl.int64) * J + j) * K
    i = tl.arange(0, C)
    past = i[:, None] >= i[None, :]
    type = k.dtype.element_ty
    if WIDE:
        type = tl.float32
    state = tl.zeros([BK, BV], tl.float32)
    if INITIAL:
        state += load_tile(initial, head, K, column, V, V, BK, BV)
    for m in range(tl.cdiv(length, C)):
        row = start + m * C
        left = length - m * C
        at = (slot + m) * J + j
        a_CC = tl.load(A + at * C * C + i[:, None] * C + i[None, :])
        k_CK = load_tile(k + h * K, row, left, 0, H * K, K, C, BK)
        v_CV = load_tile(v + j * V, row, left, column, J * V, V, C, BV)
        beta_C = load_gate(beta + j, row, left, J, C)
        c_C = tl.load(c + at * C + i)
        last = tl.load(c + at * C + C - 1)
        read_C = tl.exp(c_C)
        write_C = tl.exp(last - c_C)
        if NORM:
            r_k_C = tl.load(r_k + ((slot + m) * H + h) * C + i)
            read_C *= r_k_C
            write_C *= r_k_C
        state_low = state.to(type)
        if KEEP:
            store_tile(states, state_low, at * K, K, column, V, V, BK, BV)
        e_CV = v_CV - tl.dot(k_CK.to(type), state_low, input_precision=PRECISION) * read_C[:, None]
        e_CV = tl.dot(a_CC.to(type), e_CV.to(type), input_precision=PRECISION)
        if KEEP:
            store_tile(errors + j * V, e_CV, row, left, column, J * V, V, C, BV)
        e_CV *= beta_C[:, None]
        if not KEEP:
            q_CK = load_tile(q + h * K, row, left, 0, H * K, K, C, BK)
            p_CC = tl.dot(q_CK, tl.trans(k_CK), input_precision=PRECISION) * masked_exp(
                c_C[:, None] - c_C[None, :], past
            )
            o_CV = tl.dot(q_CK.to(type), state_low, input_precision=PRECISION) * tl.exp(c_C)[:, None]
            if NORM:
                p_CC *= r_k_C[None, :]
            o_CV += tl.dot(p_CC.to(type), e_CV.to(type), input_precision=PRECISION)
            if NORM:
                o_CV *= tl.load(r_q + ((slot + m) * H + h) * C + i)[:, None]
            store_tile(o + j * V, o_CV * scale, row, left, column, J * V, V, C, BV)
        e_CV = (e_CV * write_C[:, None]).to(type)
        state = state * tl.exp(last) + tl.dot(tl.trans(k_CK).to(type), e_CV, input_precision=PRECISION)
    if FINAL:
        store_tile(final, state, head, K, column, V, V, BK, BV)


@triton.jit(do_not_specialize=["T"])
def compute_outputs(
    q,
    k,
    v,
    beta,
    A,
    c,
    r_q,
    r_k,
    initial,
    o,
    final,
    cu_seqlens,
    T,
    scale,
    H: tl.constexpr,
    J: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    NORM: tl.constexpr,
    WIDE: tl.constexpr,
    PACKED: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Compute outputs and final states; one program per sequence, value head and BV columns."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    column = (program % blocks) * BV
    n = program // blocks // J
    j = program // blocks % J
    # fmt: off
    sweep_forward(
        q, k, v, beta, A, c, r_q, r_k, initial, o, final, o, o, cu_seqlens, n, j, column, T, scale,
        H, J, K, V, BK, BV, C, NORM, WIDE, PACKED, INITIAL, FINAL, False, PRECISION,
    )
    # fmt: on
