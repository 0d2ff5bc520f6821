# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""Scans over the rows of a tile: S_t = a_t S_{t-1} + u_t from zero, of one number or of a complex number.

The scans are associative, so no factor above 1 appears, however strong the decay is. The scans with `before` also
return a_t S_{t-1} = S_t - u_t: where a_t is small, the subtraction would leave no digits of it.
"""

import triton
import triton.language as tl


@triton.jit
def _one(a1, u1, a2, u2):
    return a1 * a2, a2 * u1 + u2


@triton.jit
def _one_before(a1, u1, k1, a2, u2, k2):
    return a1 * a2, a2 * u1 + u2, a2 * u1 + k2


@triton.jit
def _two(a1, u1, v1, a2, u2, v2):
    return a1 * a2, a2 * u1 + u2, a2 * v1 + v2


@triton.jit
def _two_before(a1, u1, v1, k1, l1, a2, u2, v2, k2, l2):
    return a1 * a2, a2 * u1 + u2, a2 * v1 + v2, a2 * u1 + k2, a2 * v1 + l2


@triton.jit
def scan_one(a, u, entered, REVERSE: tl.constexpr, DECAY: tl.constexpr):
    """Return S for what is written in the tile and what entered it [D]; without DECAY, all gates are 1."""
    if DECAY:
        passed, own = tl.associative_scan((a, u), 0, _one, REVERSE)
        return own + passed * entered[None, :]
    else:
        return tl.cumsum(u, 0, REVERSE) + entered[None, :]


@triton.jit
def scan_one_before(a, u, entered, DECAY: tl.constexpr):
    """Return a_t S_{t-1}."""
    if DECAY:
        passed, _, before = tl.associative_scan((a, u, u * 0), 0, _one_before)
        return before + passed * entered[None, :]
    else:
        return tl.cumsum(u, 0) - u + entered[None, :]


@triton.jit
def scan_two(a, u, v, entered_u, entered_v, REVERSE: tl.constexpr, DECAY: tl.constexpr):
    """Return S for a complex number, whose gates are real."""
    if DECAY:
        passed, own_u, own_v = tl.associative_scan((a, u, v), 0, _two, REVERSE)
        return own_u + passed * entered_u[None, :], own_v + passed * entered_v[None, :]
    else:
        return tl.cumsum(u, 0, REVERSE) + entered_u[None, :], tl.cumsum(v, 0, REVERSE) + entered_v[None, :]


@triton.jit
def scan_two_before(a, u, v, entered_u, entered_v, DECAY: tl.constexpr):
    """Return a_t S_{t-1} for a complex number."""
    if DECAY:
        passed, _, _, before_u, before_v = tl.associative_scan((a, u, v, u * 0, v * 0), 0, _two_before)
        return before_u + passed * entered_u[None, :], before_v + passed * entered_v[None, :]
    else:
        return tl.cumsum(u, 0) - u + entered_u[None, :], tl.cumsum(v, 0) - v + entered_v[None, :]


@triton.jit
def row_of(x, row, R: tl.constexpr):
    """Return one row of a tile."""
    return tl.sum(tl.where(tl.arange(0, R)[:, None] == row, x, 0.0), 0)
