# ruff: noqa: RUF005  (Triton has no unpacking in tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, assignment"
"""Scans over a tile: S_t = a_t S_{t-1} + u_t, of one number, or of a complex one with real gates.

First over the rows of each group from zero, then over the groups. No factor above 1 appears, however strong the decay
is; nothing is subtracted, so what one row holds never reaches the rows before it. Results are a_t S_{t-1}, to which the
caller adds u_t: where a_t is small, the difference S_t - u_t would have no digits of it.

Shapes: tuples of R tiles [G, BD], as `tiles.py` explains; what enters and leaves a tile is [1, BD].
"""

import triton
import triton.language as tl

from kernels.phase_scan.gates import pass_on
from kernels.phase_scan.tiles import add, group_of


@triton.jit
def _groups(a1, u1, b1, k1, a2, u2, b2, k2):
    """Compose S -> a S + u; S -> b S + k is without the last group."""
    return a1 * a2, a2 * u1 + u2, a1 * b2, b2 * u1 + k2


@triton.jit
def scan(gate_RGD, log_passed, u_RGD, entered, REVERSE: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """Return a_t S_{t-1} for what is written in the tile and what entered it, and S at the end.

    Args:
        gate_RGD: Gates, or None if all are 1.
        log_passed: Logarithm of their product [1, BD].
        u_RGD: What is written.
        entered: S before the tile.
        REVERSE: Begin with the last row.
        R: Rows of a group.
        G: Groups.
    """
    end: tl.constexpr = 0 if REVERSE else G - 1
    first: tl.constexpr = R - 1 if REVERSE else 0
    own_RGD = ()
    passed_RGD = ()
    if gate_RGD is None:
        sum_GD = tl.zeros_like(u_RGD[0])
        for i in tl.static_range(R):
            own_RGD = own_RGD + (sum_GD,)
            sum_GD += u_RGD[first - i if REVERSE else i]
        _, before_GD = tl.associative_scan((sum_GD, sum_GD * 0), 0, add, REVERSE)
        before_GD += entered
        last = group_of(sum_GD + before_GD, end, G)
    else:
        sum_GD = u_RGD[first]
        product_GD = gate_RGD[first]
        own_RGD = own_RGD + (tl.zeros_like(sum_GD),)
        passed_RGD = passed_RGD + (product_GD,)
        for i in tl.static_range(1, R):
            gate_GD = gate_RGD[first - i if REVERSE else i]
            own_GD = gate_GD * sum_GD
            sum_GD = own_GD + u_RGD[first - i if REVERSE else i]
            product_GD *= gate_GD
            own_RGD = own_RGD + (own_GD,)
            passed_RGD = passed_RGD + (product_GD,)
        all_GD, sums_GD, gates_GD, before_GD = tl.associative_scan(
            (product_GD, sum_GD, sum_GD * 0 + 1, sum_GD * 0), 0, _groups, REVERSE
        )
        last = group_of(sums_GD, end, G) + pass_on(group_of(all_GD, end, G), log_passed, entered)
        before_GD += gates_GD * entered
    result_RGD = ()
    for r in tl.static_range(R):
        own_GD = own_RGD[R - 1 - r if REVERSE else r]
        if gate_RGD is None:
            result_RGD = result_RGD + (own_GD + before_GD,)
        else:
            result_RGD = result_RGD + (own_GD + passed_RGD[R - 1 - r if REVERSE else r] * before_GD,)
    return result_RGD, last
