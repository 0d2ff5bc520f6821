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

LOG2_E = tl.constexpr(1.4426950408889634)
NEAR = tl.constexpr(-0.03125)  # log-decays above this are treated as small


@triton.jit
def exp_minus_one(x):
    """Return exp(x) - 1 for small x."""
    return x * (1.0 + x * (0.5 + x * (0.16666667 + x * 0.041666668)))


@triton.jit
def exp(x, COMPILED: tl.constexpr):
    """Return exp(x) for x of at most 0; 0 in place of the numbers too small for all digits of fp32."""
    if COMPILED:
        far = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * LOG2_E], tl.float32, True, 1)
    else:
        far = tl.exp(x)
    return tl.where(x > NEAR, 1.0 + exp_minus_one(x), far)


@triton.jit
def gates(log_RGD, channel_decay, left, R: tl.constexpr, G: tl.constexpr, COMPILED: tl.constexpr):
    """Return the gates of a tile and their logarithms in fp32; where there is no row, 1 and 0.

    `channel_decay` are the log-decays [G, BD] if they are the same for all rows, or None. Without `left`, all rows
    exist.
    """
    gate_RGD = ()
    wide_RGD = ()
    if channel_decay is not None:
        gate_GD = exp(channel_decay, COMPILED)
    for r in tl.static_range(R):
        if channel_decay is None:
            log_GD = log_RGD[r].to(tl.float32)
            gate_RGD = gate_RGD + (exp(log_GD, COMPILED),)
            wide_RGD = wide_RGD + (log_GD,)
        elif left is None:
            gate_RGD = gate_RGD + (gate_GD,)
            wide_RGD = wide_RGD + (channel_decay,)
        else:
            exists = rows_at(r, R, G) < left
            gate_RGD = gate_RGD + (tl.where(exists, gate_GD, 1.0),)
            wide_RGD = wide_RGD + (tl.where(exists, channel_decay, 0.0),)
    return gate_RGD, wide_RGD


@triton.jit
def later_gates(
    gate_RGD,
    log_RGD,
    log_decay,
    channel_decay,
    row,
    left,
    column,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Return gates and logarithms one row later: those of the tile, and for the last row of each group the next one."""
    later_RGD = ()
    log_later_RGD = ()
    for r in tl.static_range(1, R):
        later_RGD = later_RGD + (gate_RGD[r],)
        log_later_RGD = log_later_RGD + (log_RGD[r],)
    if channel_decay is None:
        next_GD = load_rows(log_decay, R, row, left, column, D, D, R, G, BD).to(tl.float32)
    else:
        next_GD = tl.where(rows_at(R, R, G) < left, channel_decay, 0.0)
    return later_RGD + (exp(next_GD, COMPILED),), log_later_RGD + (next_GD,)


@triton.jit
def log_product(log_RGD, channel_decay, left, R: tl.constexpr, G: tl.constexpr):
    """Return the logarithm of the product of the gates of a tile, of which `left` belong to rows."""
    if channel_decay is None:
        sum_GD = log_RGD[0]
        for r in tl.static_range(1, R):
            sum_GD += log_RGD[r]
        return tl.sum(sum_GD, 0, keep_dims=True)
    elif left is None:
        return channel_decay * (R * G)
    else:
        rows = tl.minimum(tl.maximum(left, 0), R * G)  # if there is none, a log-decay of -inf would give a NaN
        return tl.where(rows > 0, channel_decay * rows.to(tl.float32), 0.0)


@triton.jit
def pass_on(product, log, entered):
    """Return what is left of `entered` after gates with this rounded product and the logarithm of their product."""
    missing = tl.where(log > NEAR, exp_minus_one(log), tl.exp(log) - 1.0) - (product - 1.0)
    return product * entered + missing * entered
