# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""Scans over the rows of a tile [R, G, BD]: S_t = a_t S_{t-1} + u_t, of one number or of a complex one with real gates.

First over the rows of each group from zero, then over the groups. The scans are associative, so no factor above 1
appears, however strong the decay is; nothing is subtracted, so what one row holds never reaches the rows before it. The
scans with BEFORE return a_t S_{t-1} = S_t - u_t: where a_t is small, the subtraction would leave no digits of it.
"""

import triton
import triton.language as tl

from kernels.phase_scan.gates import pass_on
from kernels.phase_scan.tiles import ends_of_groups, row_of


@triton.jit
def _sum(u1, k1, u2, k2):
    """Add; k is the sum without the last term."""
    return u1 + u2, u1 + k2


@triton.jit
def _sums(u1, v1, k1, l1, u2, v2, k2, l2):
    return u1 + u2, v1 + v2, u1 + k2, v1 + l2


@triton.jit
def _rows(a1, u1, a2, u2):
    return a1 * a2, a2 * u1 + u2


@triton.jit
def _rows_before(a1, u1, k1, a2, u2, k2):
    """Compose S -> a S + u; k is what S has without the last u."""
    return a1 * a2, a2 * u1 + u2, a2 * u1 + k2


@triton.jit
def _groups(a1, u1, b1, k1, a2, u2, b2, k2):
    """Compose S -> a S + u; S -> b S + k is without the last group."""
    return a1 * a2, a2 * u1 + u2, a1 * b2, b2 * u1 + k2


@triton.jit
def _complex_rows(a1, u1, v1, a2, u2, v2):
    return a1 * a2, a2 * u1 + u2, a2 * v1 + v2


@triton.jit
def _complex_rows_before(a1, u1, v1, k1, l1, a2, u2, v2, k2, l2):
    return a1 * a2, a2 * u1 + u2, a2 * v1 + v2, a2 * u1 + k2, a2 * v1 + l2


@triton.jit
def _complex_groups(a1, u1, v1, b1, k1, l1, a2, u2, v2, b2, k2, l2):
    return a1 * a2, a2 * u1 + u2, a2 * v1 + v2, a1 * b2, b2 * u1 + k2, b2 * v1 + l2


@triton.jit
def scan(a, log_passed, u, entered, BEFORE: tl.constexpr, REVERSE: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """Return S or, with BEFORE, a_t S_{t-1}, for what is written in the tile and what entered it; and S at the end.

    Args:
        a: Gates [R, G, BD], or None if all are 1.
        log_passed: Logarithm of their product [1, 1, BD].
        u: What is written [R, G, BD].
        entered: S before the tile [1, 1, BD].
        BEFORE: Return a_t S_{t-1}.
        REVERSE: Begin with the last row.
        R: Rows of a group.
        G: Groups.
    """
    end: tl.constexpr = 0 if REVERSE else R - 1
    end_group: tl.constexpr = 0 if REVERSE else G - 1
    if a is None:
        own = tl.cumsum(u, 0, REVERSE)
        group_u = ends_of_groups(own, end, R)
        _, before = tl.associative_scan((group_u, group_u * 0), 1, _sum, REVERSE)
        entered = before + entered
        last = row_of(group_u + entered, 0, end_group, 1, G)
        if BEFORE:
            own -= u
        return own + entered, last
    else:
        if BEFORE:
            passed, sums, own = tl.associative_scan((a, u, u * 0), 0, _rows_before, REVERSE)
        else:
            passed, sums = tl.associative_scan((a, u), 0, _rows, REVERSE)
            own = sums
        group_a, group_u = ends_of_groups(passed, end, R), ends_of_groups(sums, end, R)
        zeros = group_u * 0
        all_a, all_u, gates, before = tl.associative_scan((group_a, group_u, zeros + 1, zeros), 1, _groups, REVERSE)
        last = row_of(all_u, 0, end_group, 1, G) + pass_on(row_of(all_a, 0, end_group, 1, G), log_passed, entered)
        return own + passed * (before + gates * entered), last


@triton.jit
def complex_scan(
    a,
    log_passed,
    u,
    v,
    entered_u,
    entered_v,
    BEFORE: tl.constexpr,
    REVERSE: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
):
    """Return the same for the real part u and the imaginary part v: two results, and what they are at the end."""
    end: tl.constexpr = 0 if REVERSE else R - 1
    end_group: tl.constexpr = 0 if REVERSE else G - 1
    if a is None:
        own_u, own_v = tl.cumsum(u, 0, REVERSE), tl.cumsum(v, 0, REVERSE)
        group_u, group_v = ends_of_groups(own_u, end, R), ends_of_groups(own_v, end, R)
        zeros = group_u * 0
        _, _, before_u, before_v = tl.associative_scan((group_u, group_v, zeros, zeros), 1, _sums, REVERSE)
        entered_u, entered_v = before_u + entered_u, before_v + entered_v
        last_u = row_of(group_u + entered_u, 0, end_group, 1, G)
        last_v = row_of(group_v + entered_v, 0, end_group, 1, G)
        if BEFORE:
            own_u -= u
            own_v -= v
        return own_u + entered_u, own_v + entered_v, last_u, last_v
    else:
        if BEFORE:
            zeros = u * 0
            passed, sums_u, sums_v, own_u, own_v = tl.associative_scan(
                (a, u, v, zeros, zeros), 0, _complex_rows_before, REVERSE
            )
        else:
            passed, sums_u, sums_v = tl.associative_scan((a, u, v), 0, _complex_rows, REVERSE)
            own_u, own_v = sums_u, sums_v
        group_a = ends_of_groups(passed, end, R)
        group_u, group_v = ends_of_groups(sums_u, end, R), ends_of_groups(sums_v, end, R)
        zeros = group_u * 0
        all_a, all_u, all_v, gates, before_u, before_v = tl.associative_scan(
            (group_a, group_u, group_v, zeros + 1, zeros, zeros), 1, _complex_groups, REVERSE
        )
        last_a = row_of(all_a, 0, end_group, 1, G)
        last_u = row_of(all_u, 0, end_group, 1, G) + pass_on(last_a, log_passed, entered_u)
        last_v = row_of(all_v, 0, end_group, 1, G) + pass_on(last_a, log_passed, entered_v)
        entered_u, entered_v = before_u + gates * entered_u, before_v + gates * entered_v
        return own_u + passed * entered_u, own_v + passed * entered_v, last_u, last_v


@triton.jit
def cumulative_phase(turns, entered, R: tl.constexpr):
    """Return the cumulative sum of int32, which wraps. The conversions do nothing in compiled code; the interpreter
    has sums of 64 bits, and wraps there.
    """
    own = tl.cumsum(turns, 0).to(tl.int64).to(tl.int32)
    groups = ends_of_groups(own, R - 1, R).to(tl.int64).to(tl.int32)
    _, before = tl.associative_scan((groups, groups * 0), 1, _sum)
    return own + (before + entered)
