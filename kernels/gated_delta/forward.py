# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""The second kernel of the forward: the sweep over the chunks of a sequence.

With A and P of `prepare.py`; `reference.py` has the formula of the state:

    E = A (V - exp(c) K S)
    O = scale exp(c) Q S + P E

The kernel computes transposed tiles. A computed tile is then the left operand of the next product, which Hopper's
tensor cores read from registers. A right operand would go through shared memory, and all warps would wait for it.

Shapes: as in `prepare.py`.
"""

import triton
import triton.language as tl

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
def sweep_forward(
    q,
    k,
    v,
    A,
    P,
    factors,
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
    KEEP: tl.constexpr,
):
    """Carry BV columns of a state through a sequence; store the outputs or, with KEEP, the states and errors."""
    SQUARES: tl.constexpr = 2 if PARTS == 2 else 1
    ADDED: tl.constexpr = 2 if PARTS == 1 else PARTS
    ONCE: tl.constexpr = 1 if PARTS == 2 else PARTS
    slot, start, length = first_slot(n, cu_seqlens, T, C, PACKED)
    h = j // (J // H)
    head = (n.to(tl.int64) * J + j) * K
    zeros_VC = tl.zeros([BV, C], tl.float32)
    s_VK = tl.zeros([BV, BK], tl.float32)
    if INITIAL:
        s_VK += load_tile(initial, head, K, column, V, V, BK, BV, True)
    next_VC = load_tile(v + j * V, start, length, column, J * V, V, C, BV, True)
    for m in range(tl.cdiv(length, C)):
        row = start + m * C
        left = length - m * C
        at = (slot + m) * J + j
        k_CK = load_tile(k + h * K, row, left, 0, H * K, K, C, BK)
        v_VC = next_VC  # loaded a chunk ahead here, since Triton does so only for operands of products
        next_VC = load_tile(v + j * V, row + C, left - C, column, J * V, V, C, BV, True)
        read_C = load_factor(factors, at, READ, C)
        write_C = load_factor(factors, at, WRITE, C)
        last = tl.load(factors + at * FACTOR_COUNT * C + C - 1)  # c of the last position
        if KEEP:
            store_tile(states, s_VK, at * V + column, V - column, 0, K, K, BV, BK)
        e_VC = v_VC - product(s_VK, tl.trans(k_CK), zeros_VC, PARTS) * read_C[None, :]
        e_VC = product_inverse(e_VC, A + at * SQUARES * C * C, True, C, PARTS)
        if KEEP:
            store_tile(errors + j * V, e_VC, row, left, column, J * V, V, C, BV, True)
        if not KEEP:
            q_CK = load_tile(q + h * K, row, left, 0, H * K, K, C, BK)
            o_VC = product(s_VK, tl.trans(q_CK), zeros_VC, ONCE) * load_factor(factors, at, QUERY, C)[None, :]
            o_VC = product(e_VC, tl.trans(load_square(P + at * C * C, C)), o_VC, ONCE)
            store_tile(o + j * V, o_VC, row, left, column, J * V, V, C, BV, True)
        s_VK = product(e_VC * write_C[None, :], k_CK, s_VK * tl.exp2(last), ADDED)
    if FINAL:
        store_tile(final, s_VK, head, K, column, V, V, BK, BV, True)


@triton.jit(do_not_specialize=["T"])
def compute_outputs(
    q,
    k,
    v,
    A,
    P,
    factors,
    initial,
    o,
    final,
    cu_seqlens,
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
    """Compute outputs and final states; one program per sequence, value head and BV columns."""
    blocks: tl.constexpr = (V + BV - 1) // BV
    program = tl.program_id(0)
    column = (program % blocks) * BV
    n = program // blocks // J
    j = program // blocks % J
    # fmt: off
    sweep_forward(
        q, k, v, A, P, factors, initial, o, final, o, o, cu_seqlens, n, j, column, T,
        H, J, K, V, BK, BV, C, PARTS, PACKED, INITIAL, FINAL, False,
    )
    # fmt: on
