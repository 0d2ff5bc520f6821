# ruff: noqa: RUF005  (Triton has no unpacking in tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, assignment"
"""Gates in the kernels: exp of log-decays, and their product over a tile.

Where decays are constant and weak, the rounding errors of gates are all the same, and would add up over thousands of
positions. So a gate near 1 is 1 plus a polynomial, and what leaves a tile is exact for the sum of its log-decays.
"""

import triton
import triton.language as tl

from kernels.phase_scan.tiles import load_rows, rows_at

NEAR = tl.constexpr(-0.03125)  # log-decays above this are treated as small


@triton.jit
def exp_minus_one(x):
    """Return exp(x) - 1 for small x."""
    return x * (1.0 + x * (0.5 + x * (0.16666667 + x * 0.041666668)))


@triton.jit
def exp(x):
    """Return exp(x) for x of at most 0."""
    return tl.where(x > NEAR, 1.0 + exp_minus_one(x), tl.exp(x))


@triton.jit
def load_gates(
    log_decay,
    channel_decay,
    row,
    left,
    column,
    AHEAD: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
):
    """Return the gates of the rows AHEAD rows further, 1 where there is no row, and the logarithm of their product.

    `channel_decay` are the log-decays [1, BD] if they are the same for all rows; `log_decay` has [T, D] if it is None.
    Without `left`, all rows exist.
    """
    gate_RGD = ()
    existing = None
    if left is not None:
        existing = left - AHEAD
    if channel_decay is not None:
        gate_GD = exp(channel_decay) + tl.zeros([G, BD], tl.float32)
        for r in tl.static_range(R):
            if existing is None:
                gate_RGD = gate_RGD + (gate_GD,)
            else:
                gate_RGD = gate_RGD + (tl.where(rows_at(r, R, G) < existing, gate_GD, 1.0),)
        if existing is None:
            return gate_RGD, channel_decay * (R * G)
        else:
            rows = tl.minimum(tl.maximum(existing, 0), R * G)  # if there is none, a log-decay of -inf would give a NaN
            return gate_RGD, tl.where(rows > 0, channel_decay * rows.to(tl.float32), 0.0)
    else:
        sum_GD = tl.zeros([G, BD], tl.float32)
        for r in tl.static_range(R):
            log_GD = load_rows(log_decay, r, row + AHEAD, existing, column, D, D, R, G, BD).to(tl.float32)
            sum_GD += log_GD
            gate_RGD = gate_RGD + (exp(log_GD),)
        return gate_RGD, tl.sum(sum_GD, 0, keep_dims=True)


@triton.jit
def pass_on(product, log_product, entered):
    """Return what is left of `entered` after gates with this rounded product and the logarithm of their product."""
    missing = tl.where(log_product > NEAR, exp_minus_one(log_product), tl.exp(log_product) - 1.0) - (product - 1.0)
    return product * entered + missing * entered
