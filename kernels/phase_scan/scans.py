# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""Scans over the rows of a tile [R, G, BD]: S_t = a_t S_{t-1} + u_t, of one number or of a complex one with real gates.

First over the rows of each group from zero, then over the groups. The scans are associative, so no factor above 1
appears, however strong the decay is; nothing is subtracted, so what one row holds never reaches the rows before it. The
scans with BEFORE return a_t S_{t-1} = S_t - u_t: where a_t is small, the subtraction would leave no digits of it.
"""

import triton
import triton.language as tl

from kernels.phase_scan.tiles import ends_of_groups


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
def scan(a, u, entered, BEFORE: tl.constexpr, REVERSE: tl.constexpr, DECAY: tl.constexpr, R: tl.constexpr):
    """Return S, or a_t S_{t-1}, for what is written in the tile and what entered it; without DECAY, gates are 1."""
    end: tl.constexpr = 0 if REVERSE else R - 1
    if DECAY:
        if BEFORE:
            passed, sums, own = tl.associative_scan((a, u, u * 0), 0, _rows_before, REVERSE)
        else:
            passed, sums = tl.associative_scan((a, u), 0, _rows, REVERSE)
            own = sums
        group_a, group_u = ends_of_groups(passed, end, R), ends_of_groups(sums, end, R)
        zeros = group_u * 0
        _, _, gates, before = tl.associative_scan((group_a, group_u, zeros + 1, zeros), 1, _groups, REVERSE)
        return own + passed * (before + gates * entered)
    else:
        own = tl.cumsum(u, 0, REVERSE)
        group_u = ends_of_groups(own, end, R)
        _, before = tl.associative_scan((group_u, group_u * 0), 1, _sum, REVERSE)
        if BEFORE:
            own -= u
        return own + (before + entered)


@triton.jit
def complex_scan(
    a,
    u,
    v,
    entered_u,
    entered_v,
    BEFORE: tl.constexpr,
    REVERSE: tl.constexpr,
    DECAY: tl.constexpr,
    R: tl.constexpr,
):
    """Return the same for the real part u and the imaginary part v."""
    end: tl.constexpr = 0 if REVERSE else R - 1
    if DECAY:
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
        _, _, _, gates, before_u, before_v = tl.associative_scan(
            (group_a, group_u, group_v, zeros + 1, zeros, zeros), 1, _complex_groups, REVERSE
        )
        return own_u + passed * (before_u + gates * entered_u), own_v + passed * (before_v + gates * entered_v)
    else:
        own_u, own_v = tl.cumsum(u, 0, REVERSE), tl.cumsum(v, 0, REVERSE)
        group_u, group_v = ends_of_groups(own_u, end, R), ends_of_groups(own_v, end, R)
        zeros = group_u * 0
        _, _, before_u, before_v = tl.associative_scan((group_u, group_v, zeros, zeros), 1, _sums, REVERSE)
        if BEFORE:
            own_u -= u
            own_v -= v
        return own_u + (before_u + entered_u), own_v + (before_v + entered_v)


@triton.jit
def cumulative_phase(turns, COMPILED: tl.constexpr, R: tl.constexpr):
    """Return the cumulative sum of int32, which wraps; the interpreter would widen it."""
    own = tl.cumsum(turns, 0) if COMPILED else tl.cumsum(turns.to(tl.int64), 0).to(tl.int32)
    groups = ends_of_groups(own, R - 1, R).to(tl.int32)
    _, before = tl.associative_scan((groups, groups * 0), 1, _sum)
    return own + before
