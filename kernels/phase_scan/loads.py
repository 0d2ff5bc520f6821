# ruff: noqa: RUF005  (Triton has no unpacking in tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, assignment"
"""What the kernels load for a tile, and what follows from it: phases, directions, and what is written.

A tile of a tensor that is not there is an empty tuple.

Shapes: tuples of R tiles [G, BD], as `tiles.py` explains.
"""

import triton
import triton.language as tl

from kernels.phase_scan.phases import cos_sin, lost, to_turns
from kernels.phase_scan.tiles import inside_of, load_rows, rows_at


@triton.jit
def load_tile(
    x, row, left, column, STRIDE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr
):
    """Load a tile from `row` on, of which `left` rows exist, in the type of the tensor; zeros elsewhere."""
    x_RGD = ()
    if x is not None:
        for r in tl.static_range(R):
            x_RGD = x_RGD + (load_rows(x, r, row, left, column, STRIDE, D, R, G, BD),)
    return x_RGD


@triton.jit
def load_inputs(inputs, row, left, column, D: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr):
    """Load a tile of each of six inputs, as `load_tile`."""
    # fmt: off
    return (
        load_tile(inputs[0], row, left, column, D, D, R, G, BD),
        load_tile(inputs[1], row, left, column, D, D, R, G, BD),
        load_tile(inputs[2], row, left, column, D, D, R, G, BD),
        load_tile(inputs[3], row, left, column, D, D, R, G, BD),
        load_tile(inputs[4], row, left, column, D, D, R, G, BD),
        load_tile(inputs[5], row, left, column, D, D, R, G, BD),
    )
    # fmt: on


@triton.jit
def _phases(omega_RGD, phase, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr):
    """Return the cumulative phases of a tile as int32, from the phase before it on; the phase after it; lost phases.

    Phases before and after are [1, BD], or [G, BD] with the same for each group. The last result is NaN for rows whose
    phase is lost, and 0 elsewhere.
    """
    own_RGD = ()
    lost_RGD = ()
    sum_GD = tl.zeros([G, BD], tl.int32)
    for r in tl.static_range(R):
        sum_GD += to_turns(omega_RGD[r])
        own_RGD = own_RGD + (sum_GD,)
        lost_RGD = lost_RGD + (lost(omega_RGD[r]),)
    before_GD = tl.cumsum(sum_GD, 0) - sum_GD + phase
    phase_RGD = ()
    for r in tl.static_range(R):
        phase_RGD = phase_RGD + (before_GD + own_RGD[r],)
    return phase_RGD, (phase + tl.sum(sum_GD, 0, keep_dims=True)).to(tl.int64).to(tl.int32), lost_RGD


@triton.jit
def _cos_sin(phase_RGD, R: tl.constexpr, COMPILED: tl.constexpr):
    """Return cosines and sines of phases."""
    cos_RGD = ()
    sin_RGD = ()
    for r in tl.static_range(R):
        cos_GD, sin_GD = cos_sin(phase_RGD[r], COMPILED)
        cos_RGD = cos_RGD + (cos_GD,)
        sin_RGD = sin_RGD + (sin_GD,)
    return cos_RGD, sin_RGD


@triton.jit
def _direction(offset_RGD, phase_RGD, cos_RGD, sin_RGD, OFFSET: tl.constexpr, R: tl.constexpr, COMPILED: tl.constexpr):
    """Return cosine and sine of phase and offset: those of the phase if there is no offset."""
    if not OFFSET:
        return cos_RGD, sin_RGD
    else:
        re_RGD = ()
        im_RGD = ()
        for r in tl.static_range(R):
            re_GD, im_GD = cos_sin(phase_RGD[r] + to_turns(offset_RGD[r]), COMPILED)
            re_RGD = re_RGD + (re_GD + lost(offset_RGD[r]),)
            im_RGD = im_RGD + (im_GD,)
        return re_RGD, im_RGD


@triton.jit
def directions(
    omega_RGD,
    read_offset_RGD,
    write_offset_RGD,
    phase,
    READ: tl.constexpr,
    WRITE: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Return what `_phases` returns, and cosine and sine of the phases of writer and reader.

    READ and WRITE say which of them have an offset. Empty tuples alone would not: they leave no trace in the name under
    which Triton keeps a compiled function, and it would take that of the one for the other.
    """
    phase_RGD, last, lost_RGD = _phases(omega_RGD, phase, R, G, BD)
    cos_RGD, sin_RGD = _cos_sin(phase_RGD, R, COMPILED)
    write_re_RGD, write_im_RGD = _direction(write_offset_RGD, phase_RGD, cos_RGD, sin_RGD, WRITE, R, COMPILED)
    read_re_RGD, read_im_RGD = _direction(read_offset_RGD, phase_RGD, cos_RGD, sin_RGD, READ, R, COMPILED)
    return phase_RGD, last, lost_RGD, write_re_RGD, write_im_RGD, read_re_RGD, read_im_RGD


@triton.jit
def written(x_RGD, mass_RGD, lost_RGD, cos_RGD, sin_RGD, left, MASS: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """Return values, masses, and what is written: real and imaginary parts. Without masses, a row has the mass 1.

    Values are NaN where phases are lost; the backward leaves this out.
    """
    wide_RGD = ()
    given_RGD = ()
    re_RGD = ()
    im_RGD = ()
    for r in tl.static_range(R):
        x_GD = x_RGD[r].to(tl.float32)
        if lost_RGD is not None:
            x_GD += lost_RGD[r]
        if not MASS:
            mass_GD = tl.where(inside_of(rows_at(r, R, G), 0, left, 1, 1), 1.0, 0.0) + tl.zeros_like(x_GD)
            u_GD = x_GD
        else:
            mass_GD = mass_RGD[r].to(tl.float32)
            u_GD = x_GD * mass_GD
        wide_RGD = wide_RGD + (x_GD,)
        given_RGD = given_RGD + (mass_GD,)
        re_RGD = re_RGD + (u_GD * cos_RGD[r],)
        im_RGD = im_RGD + (u_GD * sin_RGD[r],)
    return wide_RGD, given_RGD, re_RGD, im_RGD
