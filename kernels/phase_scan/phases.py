# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""Phases in the kernels: integers, 2^32 of which are one turn, so a sum wraps by itself and no digit is ever lost.

The rounding to 2^-32 of a turn adds up to at most 1.2e-5 rad over 16384 positions, also where all phases are equal. The
product of an fp32 phase and 1 / (2 pi) has more digits than fp32, so it is computed as a sum of two numbers.
"""

import triton
import triton.language as tl

PER_RADIAN = tl.constexpr(0.15915493667125702)  # 1 / (2 pi) in fp32, and what is missing
PER_RADIAN_REST = tl.constexpr(6.420638326565253e-09)
RADIANS = tl.constexpr(1.4629180792671596e-09)  # 2 pi / 2^32
ROUND = tl.constexpr(12582912.0)  # 1.5 * 2^23: behind it, fp32 has no digits after the point
ROUND_BITS = tl.constexpr(0x4B400000)
TINY = tl.constexpr(1e-30)  # keeps a compiler from merging a product with the sums that need it rounded


@triton.jit
def to_turns(phase):
    """Return phases in radians as parts of a turn in int32, to 2^-33 of a turn; to 2^-25 for phases of 16 bits."""
    wide = phase.to(tl.float32)
    turns = tl.fma(wide, tl.full(wide.shape, PER_RADIAN, tl.float32), tl.full(wide.shape, TINY, tl.float32))
    part = turns - ((turns + ROUND) - ROUND)
    if phase.dtype.primitive_bitwidth == 16:
        return ((part + wide * PER_RADIAN_REST) * 4294967040.0).to(tl.int32)
    else:
        rest = tl.fma(wide, tl.full(wide.shape, PER_RADIAN, tl.float32), -turns) + wide * PER_RADIAN_REST
        high = part * 65536.0 + ROUND
        low = (part * 65536.0 - (high - ROUND) + rest * 65536.0) * 65536.0 + ROUND
        return (high.to(tl.int32, bitcast=True) << 16) + (low.to(tl.int32, bitcast=True) - ROUND_BITS)


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
