# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""Phases in the kernels: integers, 2^32 of which are one turn, so a sum wraps by itself and no digit is ever lost.

The rounding to 2^-32 of a turn adds up to at most 2.4e-5 rad over 16384 positions, also where all phases are equal. The
product of an fp32 phase and 1 / (2 pi) has more digits than fp32, so the nearest of 2^10 parts of a turn is taken off
first: what is left has few digits, and no instruction of the slow units converts a number.
"""

import triton
import triton.language as tl

STEP_BITS = tl.constexpr(22)  # of the 32 of a turn: a phase is the nearest of 2^10 steps, and what is left
STEPS_PER_RADIAN = tl.constexpr(162.9746551513672)
STEP = tl.constexpr(4194304.0)  # 2^22
UNITS = tl.constexpr(683565248.0)  # 2^32 / (2 pi) in fp32, and what is missing
UNITS_REST = tl.constexpr(27.576431274414062)
RADIANS = tl.constexpr(1.4629180792671596e-09)  # 2 pi / 2^32
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: behind it, fp32 has no digits after the point
ROUND_BITS = tl.constexpr(0x4B400000)
FROM_ROUND = tl.constexpr(52776570716160.0)  # (ROUND + 3) 2^22, and 3 * 2^22 is ROUND
BEYOND = tl.constexpr(1.36e34)  # the product with 25 000 is at the end of the range of fp32


@triton.jit
def to_turns(phase):
    """Return phases in radians as parts of a turn in int32, to one of them; `lost` says where this is not possible."""
    wide = phase.to(tl.float32)
    whole = tl.fma(wide, tl.full(wide.shape, STEPS_PER_RADIAN, tl.float32), tl.full(wide.shape, ROUND, tl.float32))
    part = tl.fma(whole, tl.full(wide.shape, -STEP, tl.float32), tl.full(wide.shape, FROM_ROUND, tl.float32))
    part = tl.fma(wide, tl.full(wide.shape, UNITS, tl.float32), part)
    part = tl.fma(wide, tl.full(wide.shape, UNITS_REST, tl.float32), part)
    return (whole.to(tl.int32, bitcast=True) << STEP_BITS) + (part.to(tl.int32, bitcast=True) - ROUND_BITS)


@triton.jit
def lost(phase):
    """Return 0, or NaN for phases that `to_turns` cannot convert: NaN, infinity, and those beyond 25 000 rad."""
    return phase.to(tl.float32) * BEYOND * 0.0


@triton.jit
def cos_sin(turns, COMPILED: tl.constexpr):
    """Return cosine and sine, accurate to 5e-7, with the instructions of the GPU."""
    radians = turns.to(tl.float32) * RADIANS
    if COMPILED:
        cos = tl.inline_asm_elementwise("cos.approx.f32 $0, $1;", "=f,f", [radians], tl.float32, True, 1)
        sin = tl.inline_asm_elementwise("sin.approx.f32 $0, $1;", "=f,f", [radians], tl.float32, True, 1)
        return cos, sin
    else:
        return tl.cos(radians), tl.sin(radians)
