# ruff: noqa: RUF005  (Triton has no unpacking in tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, assignment"
"""What the kernels load for a tile: phases, directions, and what is written.

Shapes: tuples of R tiles [G, BD], as `tiles.py` explains.
"""

import triton
import triton.language as tl

from kernels.phase_scan.phases import cos_sin, lost, to_turns
from kernels.phase_scan.tiles import inside_of, load_rows, rows_at


@triton.jit
def _load_phases(omega, phase, row, left, column, D: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr):
    """Return the cumulative phases of a tile as int32, from the phase before it on; the phase after it; lost phases.

    Phases before and after are [1, BD], or [G, BD] with the same for each group. The last result is NaN for rows whose
    phase is lost, and 0 elsewhere.
    """
    own_RGD = ()
    lost_RGD = ()
    sum_GD = tl.zeros([G, BD], tl.int32)
    for r in tl.static_range(R):
        omega_GD = load_rows(omega, r, row, left, column, D, D, R, G, BD)
        sum_GD += to_turns(omega_GD)
        own_RGD = own_RGD + (sum_GD,)
        lost_RGD = lost_RGD + (lost(omega_GD),)
    before_GD = tl.cumsum(sum_GD, 0) - sum_GD + phase
    phase_RGD = ()
    for r in tl.static_range(R):
        phase_RGD = phase_RGD + (before_GD + own_RGD[r],)
    return phase_RGD, (phase + tl.sum(sum_GD, 0, keep_dims=True)).to(tl.int64).to(tl.int32), lost_RGD


@triton.jit
def _directions(phase_RGD, R: tl.constexpr, COMPILED: tl.constexpr):
    """Return cosines and sines of phases."""
    cos_RGD = ()
    sin_RGD = ()
    for r in tl.static_range(R):
        cos_GD, sin_GD = cos_sin(phase_RGD[r], COMPILED)
        cos_RGD = cos_RGD + (cos_GD,)
        sin_RGD = sin_RGD + (sin_GD,)
    return cos_RGD, sin_RGD


@triton.jit
def _load_direction(
    offset,
    phase_RGD,
    cos_RGD,
    sin_RGD,
    row,
    left,
    column,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Return cosine and sine of phase and offset: those of the phase if there is no offset."""
    if offset is None:
        return cos_RGD, sin_RGD
    else:
        re_RGD = ()
        im_RGD = ()
        for r in tl.static_range(R):
            offset_GD = load_rows(offset, r, row, left, column, D, D, R, G, BD)
            re_GD, im_GD = cos_sin(phase_RGD[r] + to_turns(offset_GD), COMPILED)
            re_RGD = re_RGD + (re_GD + lost(offset_GD),)
            im_RGD = im_RGD + (im_GD,)
        return re_RGD, im_RGD


@triton.jit
def load_directions(
    omega,
    read_offset,
    write_offset,
    phase,
    row,
    left,
    column,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Return what `_load_phases` returns, and cosine and sine of the phases of writer and reader."""
    phase_RGD, last, lost_RGD = _load_phases(omega, phase, row, left, column, D, R, G, BD)
    cos_RGD, sin_RGD = _directions(phase_RGD, R, COMPILED)
    # fmt: off
    write_re_RGD, write_im_RGD = _load_direction(
        write_offset, phase_RGD, cos_RGD, sin_RGD, row, left, column, D, R, G, BD, COMPILED
    )
    read_re_RGD, read_im_RGD = _load_direction(
        read_offset, phase_RGD, cos_RGD, sin_RGD, row, left, column, D, R, G, BD, COMPILED
    )
    # fmt: on
    return phase_RGD, last, lost_RGD, write_re_RGD, write_im_RGD, read_re_RGD, read_im_RGD


@triton.jit
def load_written(
    x,
    mass,
    lost_RGD,
    cos_RGD,
    sin_RGD,
    row,
    left,
    column,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
):
    """Return values, masses, and what is written: real and imaginary parts. Without masses, a row has the mass 1.

    Values are NaN where phases are lost; the backward leaves this out.
    """
    x_RGD = ()
    mass_RGD = ()
    re_RGD = ()
    im_RGD = ()
    for r in tl.static_range(R):
        x_GD = load_rows(x, r, row, left, column, D, D, R, G, BD).to(tl.float32)
        if lost_RGD is not None:
            x_GD += lost_RGD[r]
        if mass is None:
            mass_GD = tl.where(inside_of(rows_at(r, R, G), 0, left, 1, 1), 1.0, 0.0) + tl.zeros_like(x_GD)
            u_GD = x_GD
        else:
            mass_GD = load_rows(mass, r, row, left, column, D, D, R, G, BD).to(tl.float32)
            u_GD = x_GD * mass_GD
        x_RGD = x_RGD + (x_GD,)
        mass_RGD = mass_RGD + (mass_GD,)
        re_RGD = re_RGD + (u_GD * cos_RGD[r],)
        im_RGD = im_RGD + (u_GD * sin_RGD[r],)
    return x_RGD, mass_RGD, re_RGD, im_RGD
