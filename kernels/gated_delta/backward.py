# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""The first kernel of the backward: both sweeps over the chunks of a sequence in one launch.

With A and P of `prepare.py`, and the cotangents dO of the outputs and dS of the state after a chunk:

    dV = A^T (P^T dO + (beta exp(c_last - c) K) dS)
    dS <- exp(c_last) dS + scale (Q exp(c))^T dO - (K exp(c))^T dV

This sweep needs neither states nor errors, so it runs beside the sweep that computes them again. As in `forward.py`,
tiles are transposed. No product here or in `gradients.py` has a transposed accumulator as its operand: Triton 3.4
to 3.7 miscompiles that on Hopper.

Shapes: as in `prepare.py`.
"""

import triton
import triton.language as tl

from kernels.gated_delta.forward import sweep_forward
from kernels.gated_delta.tiles import (
    FACTOR_COUNT,
    QUERY,
    READ,
    WRITE,
    first_slot,
    load_factor,
    load_square,
    load_tile,
    product,
    product_inverse,
    store_tile,
)


@triton.jit
def sweep_backward(
    q,
    k,
    do,
    A,
    P,
    factors,
    dfinal,
    dv,
    dstates,
    dinitial,
    cu_seqlens,
    n,
    j,
    column,
    T,
    H: tl.constexpr,
    J: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    PACKED: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
):
    """Carry BV columns of the cotangent of a state back through a sequence; store it for each chunk, and dV."""
    SQUARES: tl.constexpr = 2 if PARTS == 2 else 1
    ADDED: tl.constexpr = 2 if PARTS == 1 else PARTS
    ONCE: tl.constexpr = 1 if PARTS == 2 else PARTS
    slot, start, length = first_slot(n, cu_seqlens, T, C, PACKED)
    h = j // (J // H)
    head = (n.to(tl.int64) * J + j) * K
    zeros_VC = tl.zeros([BV, C], tl.float32)
    ds_VK = tl.zeros([BV, BK], tl.float32)
    if FINAL:
        ds_VK += load_tile(dfinal, head, K, column, V, V, BK, BV, True)
    chunks = tl.cdiv(length, C)
    for back in range(chunks):
        m = chunks - 1 - back
        row = start + m * C
        left = length - m * C
        at = (slot + m) * J + j
        q_CK = load_tile(q + h * K, row, left, 0, H * K, K, C, BK)
        k_CK = load_tile(k + h * K, row, left, 0, H * K, K, C, BK)
        do_VC = load_tile(do + j * V, row, left, column, J * V, V, C, BV, True).to(tl.float32)
        query_C = load_factor(factors, at, QUERY, C)
        read_C = load_factor(factors, at, READ, C)
        write_C = load_factor(factors, at, WRITE, C)
        last = tl.load(factors + at * FACTOR_COUNT * C + C - 1)
        store_tile(dstates, ds_VK, at * V + column, V - column, 0, K, K, BV, BK)
        y_VC = product(do_VC, load_square(P + at * C * C, C), zeros_VC, ONCE)
        y_VC += product(ds_VK, tl.trans(k_CK), zeros_VC, PARTS) * write_C[None, :]
        dv_VC = product_inverse(y_VC, A + at * SQUARES * C * C, False, C, PARTS)
        store_tile(dv + j * V, dv_VC, row, left, column, J * V, V, C, BV, True)
        ds_VK = product(do_VC * query_C[None, :], q_CK, ds_VK * tl.exp2(last), ONCE)
        ds_VK = product(-dv_VC * read_C[None, :], k_CK, ds_VK, ADDED)
    if INITIAL:
        store_tile(dinitial, ds_VK, head, K, column, V, V, BK, BV, True)


@triton.jit(do_not_specialize=["N", "T"])
def sweep_both_ways(
    q,
    k,
    v,
    do,
    A,
    P,
    factors,
    initial,
    dfinal,
    dv,
    states,
    errors,
    dstates,
    dinitial,
    cu_seqlens,
    N,
    T,
    H: tl.constexpr,
    J: tl.constexpr,
    K: tl.constexpr,
    V: tl.constexpr,
    BK: tl.constexpr,
    BV: tl.constexpr,
    C: tl.constexpr,
    PARTS: tl.constexpr,
    PACKED: tl.constexpr,
    INITIAL: tl.constexpr,
    FINAL: tl.constexpr,
):
    """Compute dV, dS and states and errors again; a program per direction, sequence, value head and BV columns."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    column = (program % blocks) * BV
    n = program // blocks // J
    j = program // blocks % J
    # fmt: off
    if n < N:  # the longer job first
        sweep_backward(
            q, k, do, A, P, factors, dfinal, dv, dstates, dinitial, cu_seqlens, n, j, column, T,
            H, J, K, V, BK, BV, C, PARTS, PACKED, INITIAL, FINAL,
        )
    else:
        sweep_forward(
            q, k, v, A, P, factors, initial, v, v, states, errors, cu_seqlens, n - N, j, column, T,
            H, J, K, V, BK, BV, C, PARTS, PACKED, INITIAL, False, True,
        )
    # fmt: on
