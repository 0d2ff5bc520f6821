# ruff: noqa: RUF005  (Triton has no unpacking in tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, assignment"
"""Scans over a tile: S_t = a_t S_{t-1} + u_t, of one number, or of a complex one with real gates.

First over the rows of each group from zero, then over the groups. No factor above 1 appears, however strong the decay
is; nothing is subtracted, so what one row holds never reaches the rows before it. Results are S_t, or a_t S_{t-1} where
the backward needs it: where a_t is small, the difference S_t - u_t would have no digits of it.

Shapes: tuples of R tiles [G, BD], as `tiles.py` explains; what enters a tile is [1, BD], or [G, BD] with the same
numbers for each group, and what leaves it is [1, BD].
"""

import triton
import triton.language as tl

from kernels.phase_scan.gates import pass_on
from kernels.phase_scan.tiles import group_of


@triton.jit
def _add(u1, b1, u2, b2):
    """Add; b is without the last group."""
    return u1 + u2, u1 + b2


@triton.jit
def _add_two(u1, b1, v1, c1, u2, b2, v2, c2):
    """Add two sums; b and c are without the last group."""
    return u1 + u2, u1 + b2, v1 + v2, v1 + c2


@triton.jit
def _groups(a1, u1, b1, k1, a2, u2, b2, k2):
    """Compose S -> a S + u; S -> b S + k is without the last group."""
    return a1 * a2, a2 * u1 + u2, a1 * b2, b2 * u1 + k2


@triton.jit
def _groups_two(a1, u1, v1, b1, k1, l1, a2, u2, v2, b2, k2, l2):
    """Compose two of them with the same gates; S -> b S + k and S -> b S + l are without the last group."""
    return a1 * a2, a2 * u1 + u2, a2 * v1 + v2, a1 * b2, b2 * u1 + k2, b2 * v1 + l2


@triton.jit
def _passed(gate_RGD, REVERSE: tl.constexpr, R: tl.constexpr):
    """Return the products of the gates of each group up to each row, in the order of the scan, and the last."""
    product_GD = gate_RGD[R - 1 if REVERSE else 0]
    passed_RGD = (product_GD,)
    for i in tl.static_range(1, R):
        product_GD *= gate_RGD[R - 1 - i if REVERSE else i]
        passed_RGD = passed_RGD + (product_GD,)
    return passed_RGD, product_GD


@triton.jit
def _within(gate_RGD, u_RGD, KEPT: tl.constexpr, REVERSE: tl.constexpr, R: tl.constexpr):
    """Return the scans of the groups from zero, in the order of the scan, and their ends."""
    sum_GD = u_RGD[R - 1 if REVERSE else 0]
    own_RGD = ((tl.zeros_like(sum_GD) if KEPT else sum_GD),)
    for i in tl.static_range(1, R):
        kept_GD = sum_GD
        if gate_RGD is not None:
            kept_GD = gate_RGD[R - 1 - i if REVERSE else i] * sum_GD
        sum_GD = kept_GD + u_RGD[R - 1 - i if REVERSE else i]
        own_RGD = own_RGD + ((kept_GD if KEPT else sum_GD),)
    return own_RGD, sum_GD


@triton.jit
def _enter(own_RGD, passed_RGD, before_GD, REVERSE: tl.constexpr, R: tl.constexpr):
    """Add what entered each group to its own scan; rows are in their own order again."""
    result_RGD = ()
    for r in tl.static_range(R):
        entered_GD = before_GD
        if passed_RGD is not None:
            entered_GD = passed_RGD[R - 1 - r if REVERSE else r] * before_GD
        result_RGD = result_RGD + (own_RGD[R - 1 - r if REVERSE else r] + entered_GD,)
    return result_RGD


@triton.jit
def scan(
    gate_RGD, log_passed, u_RGD, entered, KEPT: tl.constexpr, REVERSE: tl.constexpr, R: tl.constexpr, G: tl.constexpr
):
    """Return S_t for what is written in the tile and what entered it, and S at the end.

    Args:
        gate_RGD: Gates, or None if all are 1.
        log_passed: Logarithm of their product [1, BD].
        u_RGD: What is written.
        entered: S before the tile.
        KEPT: Return a_t S_{t-1} in place of S_t.
        REVERSE: Begin with the last row.
        R: Rows of a group.
        G: Groups.
    """
    own_RGD, sum_GD = _within(gate_RGD, u_RGD, KEPT, REVERSE, R)
    if gate_RGD is None:
        _, before_GD = tl.associative_scan((sum_GD, tl.zeros_like(sum_GD)), 0, _add, REVERSE)
        last = entered + tl.sum(sum_GD, 0, keep_dims=True)
        return _enter(own_RGD, None, before_GD + entered, REVERSE, R), last
    else:
        end: tl.constexpr = 0 if REVERSE else G - 1
        passed_RGD, product_GD = _passed(gate_RGD, REVERSE, R)
        zero_GD = tl.zeros_like(sum_GD)
        all_GD, sum_GD, gates_GD, before_GD = tl.associative_scan(
            (product_GD, sum_GD, zero_GD + 1, zero_GD), 0, _groups, REVERSE
        )
        last = group_of(sum_GD, end, G) + pass_on(group_of(all_GD, end, G), log_passed, entered)
        return _enter(own_RGD, passed_RGD, before_GD + gates_GD * entered, REVERSE, R), last


@triton.jit
def scan_two(
    gate_RGD,
    log_passed,
    u_RGD,
    v_RGD,
    u_entered,
    v_entered,
    KEPT: tl.constexpr,
    REVERSE: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    """Return what `scan` returns for u and for v, which have the same gates: products of gates are computed once."""
    u_own_RGD, u_GD = _within(gate_RGD, u_RGD, KEPT, REVERSE, R)
    v_own_RGD, v_GD = _within(gate_RGD, v_RGD, KEPT, REVERSE, R)
    zero_GD = tl.zeros_like(u_GD)
    if gate_RGD is None:
        _, u_before_GD, _, v_before_GD = tl.associative_scan((u_GD, zero_GD, v_GD, zero_GD), 0, _add_two, REVERSE)
        u_last = u_entered + tl.sum(u_GD, 0, keep_dims=True)
        v_last = v_entered + tl.sum(v_GD, 0, keep_dims=True)
        result_RGD = _enter(u_own_RGD, None, u_before_GD + u_entered, REVERSE, R)
        return result_RGD, _enter(v_own_RGD, None, v_before_GD + v_entered, REVERSE, R), u_last, v_last
    else:
        end: tl.constexpr = 0 if REVERSE else G - 1
        passed_RGD, product_GD = _passed(gate_RGD, REVERSE, R)
        all_GD, u_GD, v_GD, gates_GD, u_before_GD, v_before_GD = tl.associative_scan(
            (product_GD, u_GD, v_GD, zero_GD + 1, zero_GD, zero_GD), 0, _groups_two, REVERSE
        )
        product = group_of(all_GD, end, G)
        u_last = group_of(u_GD, end, G) + pass_on(product, log_passed, u_entered)
        v_last = group_of(v_GD, end, G) + pass_on(product, log_passed, v_entered)
        result_RGD = _enter(u_own_RGD, passed_RGD, u_before_GD + gates_GD * u_entered, REVERSE, R)
        return result_RGD, _enter(v_own_RGD, passed_RGD, v_before_GD + gates_GD * v_entered, REVERSE, R), u_last, v_last
