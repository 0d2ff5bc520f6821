# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""The second kernel of the backward: the gradients, of which each chunk computes its own.

With the states S and errors E, and the cotangents dO of the outputs, dS of the state after a chunk, and dV:

    dQ = scale (exp(c) dO S^T + ((dO E^T) diag(beta) o G) K)
    dK_read = exp(c) dV S^T + ((dV E^T) diag(beta) o strict(G)) K
    W = exp(c_last - c) E dS^T + scale ((E dO^T) o G^T) Q - ((E dV^T) o strict(G)^T) K
    dK = beta W - dK_read
    dbeta = rowsum(K o W)
    dc = rowsum(Q o dQ) - rowsum(K o dK_read) - beta dbeta
    dc_last += exp(c_last) <S, dS> + sum(beta rowsum((exp(c_last - c) E dS^T) o K))

dg is the sum of dc from its position on. In dc, the diagonal terms of dQ and W cancel, and the terms of the last
position in W and in the sum. They are left out of dc, because under strong decay their rounding errors are larger
than dc.

Constraints of Triton 3.6:
- A tile in a loop goes either to products or to arithmetic of its elements, never to both. Otherwise Triton keeps one
  buffer too few, and loads the next tile while a product of Hopper's tensor cores may still read the last one. So
  <S, dS> is the trace of a product.
- The diagonal terms are products with a diagonal matrix. To extract the diagonal would change a tile's layout, which
  costs more.
- They are subtracted. A product that adds to the sum of another one, outside of loops, gets a layout of 128 rows, of
  which a chunk has 64.

Shapes: as in `prepare.py`.
"""

import triton
import triton.language as tl

from kernels.gated_delta.tiles import (
    FACTOR_COUNT,
    LOG_DECAY,
    NORM_K,
    NORM_Q,
    load_factor,
    load_gate,
    load_tile,
    masked_exp2,
    rows_of,
    store_tile,
)


@triton.jit(do_not_specialize=["N", "T"])
def compute_gradients(
    q,
    k,
    beta,
    factors,
    do,
    dv,
    states,
    errors,
    dstates,
    dq,
    dk,
    dg,
    dbeta,
    cu_seqlens,
    N,
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
    PACKED: tl.constexpr,
):
    """Compute dQ and dK per value head, dg and dbeta; one program per slot and value head."""
    slot = (tl.program_id(0) // J).to(tl.int64)
    j = tl.program_id(0) % J
    h = j // (J // H)
    row, left = rows_of(slot, cu_seqlens, N, T, C, PACKED)
    if left <= 0:
        return
    at = slot * J + j
    i = tl.arange(0, C)
    type = states.dtype.element_ty
    diagonal_CC = i[:, None] == i[None, :]
    if BK > 64:
        c_C, beta_C, r_q_C, r_k_C = _load_factors(beta, factors, at, row, left, j, J, C)
        q_CK = load_tile(q + h * K, row, left, 0, H * K, K, C, BK)
        k_CK = load_tile(k + h * K, row, left, 0, H * K, K, C, BK)

    # What the positions read: dQ and dK_read
    dq_CK = tl.zeros([C, BK], tl.float32)
    dk_CK = tl.zeros([C, BK], tl.float32)
    do_e_CC = tl.zeros([C, C], tl.float32)
    dv_e_CC = tl.zeros([C, C], tl.float32)
    s_ds_VV = tl.zeros([BV, BV], tl.float32)
    for column in range(0, V, BV):
        s_VK = load_tile(states, at * V + column, V - column, 0, K, K, BV, BK)
        ds_VK = load_tile(dstates, at * V + column, V - column, 0, K, K, BV, BK)
        do_CV = load_tile(do + j * V, row, left, column, J * V, V, C, BV).to(type)
        dv_CV = load_tile(dv + j * V, row, left, column, J * V, V, C, BV).to(type)
        e_CV = load_tile(errors + j * V, row, left, column, J * V, V, C, BV).to(type)
        dq_CK = tl.dot(do_CV, s_VK, dq_CK, input_precision="tf32x3")
        dk_CK = tl.dot(dv_CV, s_VK, dk_CK, input_precision="tf32x3")
        do_e_CC = tl.dot(do_CV, tl.trans(e_CV), do_e_CC, input_precision="tf32x3")
        dv_e_CC = tl.dot(dv_CV, tl.trans(e_CV), dv_e_CC, input_precision="tf32x3")
        s_ds_VV = tl.dot(s_VK, tl.trans(ds_VK), s_ds_VV, input_precision="tf32x3")
    b = tl.arange(0, BV)
    trace = tl.sum(tl.sum(tl.where(b[:, None] == b[None, :], s_ds_VV, 0.0), 1), 0)
    if BK <= 64:  # not earlier: the four warps of the table have too few registers to keep both through the loop
        c_C, beta_C, r_q_C, r_k_C = _load_factors(beta, factors, at, row, left, j, J, C)
        q_CK = load_tile(q + h * K, row, left, 0, H * K, K, C, BK)
        k_CK = load_tile(k + h * K, row, left, 0, H * K, K, C, BK)
    past_CC = masked_exp2(c_C[:, None] - c_C[None, :], i[:, None] > i[None, :])
    do_e_CC *= (beta_C * r_k_C * scale)[None, :]
    dv_e_CC *= (beta_C * r_k_C)[None, :]
    dq_CK *= (tl.exp2(c_C) * scale)[:, None]
    dk_CK *= tl.exp2(c_C)[:, None]
    dq_CK += tl.dot((do_e_CC * past_CC).to(type), k_CK.to(type), input_precision="tf32x3")
    dk_CK += tl.dot((dv_e_CC * past_CC).to(type), k_CK.to(type), input_precision="tf32x3")
    queries_CK = q_CK.to(tl.float32) * r_q_C[:, None]
    keys_CK = k_CK.to(tl.float32) * r_k_C[:, None]
    dc_C = tl.sum(queries_CK * dq_CK - keys_CK * dk_CK, 1)
    dq_CK -= tl.dot(tl.where(diagonal_CC, -do_e_CC, 0.0).to(type), k_CK.to(type), input_precision="tf32x3")
    if NORM:
        dq_CK = (dq_CK - queries_CK * tl.sum(queries_CK * dq_CK, 1)[:, None]) * r_q_C[:, None]
    store_tile(dq + j * K, dq_CK, row, left, 0, J * K, K, C, BK)

    # What they write: W
    w_CK = tl.zeros([C, BK], tl.float32)
    e_do_CC = tl.zeros([C, C], tl.float32)
    e_dv_CC = tl.zeros([C, C], tl.float32)
    for column in range(0, V, BV):
        ds_VK = load_tile(dstates, at * V + column, V - column, 0, K, K, BV, BK)
        do_CV = load_tile(do + j * V, row, left, column, J * V, V, C, BV).to(type)
        dv_CV = load_tile(dv + j * V, row, left, column, J * V, V, C, BV).to(type)
        e_CV = load_tile(errors + j * V, row, left, column, J * V, V, C, BV).to(type)
        w_CK = tl.dot(e_CV, ds_VK, w_CK, input_precision="tf32x3")
        e_do_CC = tl.dot(e_CV, tl.trans(do_CV), e_do_CC, input_precision="tf32x3")
        e_dv_CC = tl.dot(e_CV, tl.trans(dv_CV), e_dv_CC, input_precision="tf32x3")
    # c, beta, the norms and queries again: there are too few registers, and too little shared memory, to keep them
    c_C, beta_C, r_q_C, r_k_C = _load_factors(beta, factors, at, row, left, j, J, C)
    last = tl.load(factors + at * FACTOR_COUNT * C + C - 1)
    q_CK = load_tile(q + h * K, row, left, 0, H * K, K, C, BK)
    future_CC = masked_exp2(c_C[None, :] - c_C[:, None], i[:, None] < i[None, :])
    w_CK *= tl.exp2(last - c_C)[:, None]
    # What the last position writes has not decayed yet: its two terms in dc cancel
    decaying_C = tl.where(i < tl.minimum(left, C) - 1, beta_C, 0.0)
    kept = trace * tl.exp2(last)
    kept += tl.sum(decaying_C * tl.sum(w_CK * keys_CK, 1), 0)
    e_do_CC *= (r_q_C * scale)[None, :]
    w_CK += tl.dot((e_do_CC * future_CC).to(type), q_CK.to(type), input_precision="tf32x3")
    e_dv_CC *= future_CC * r_k_C[None, :]
    w_CK -= tl.dot(e_dv_CC.to(type), k_CK.to(type), input_precision="tf32x3")
    dc_C += tl.where(i == C - 1, kept, 0.0) - decaying_C * tl.sum(keys_CK * w_CK, 1)
    tl.store(dg + j + row * J + i * J, tl.cumsum(dc_C, 0, reverse=True), mask=i < left)
    w_CK -= tl.dot(tl.where(diagonal_CC, -e_do_CC, 0.0).to(type), q_CK.to(type), input_precision="tf32x3")
    tl.store(dbeta + j + row * J + i * J, tl.sum(keys_CK * w_CK, 1), mask=i < left)

    dk_CK = w_CK * beta_C[:, None] - dk_CK
    if NORM:
        dk_CK = (dk_CK - keys_CK * tl.sum(keys_CK * dk_CK, 1)[:, None]) * r_k_C[:, None]
    store_tile(dk + j * K, dk_CK, row, left, 0, J * K, K, C, BK)


@triton.jit
def _load_factors(beta, factors, at, row, left, j, J: tl.constexpr, C: tl.constexpr):
    """Load c, beta and the factors of the norms of queries and keys."""
    return (
        load_factor(factors, at, LOG_DECAY, C),
        load_gate(beta + j, row, left, J, C),
        load_factor(factors, at, NORM_Q, C),
        load_factor(factors, at, NORM_K, C),
    )
