# ruff: noqa: RUF005  (Triton has no unpacking in tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, assignment"
"""Loads and stores of the kernels, and the scans over the groups of a tile.

A tile has C = G R rows in G groups of R: group g has the rows g R to g R + R - 1. The kernels hold it as R tiles
[G, BD], one per place r in a group, in a tuple named with RGD. A thread has the same group in all of them, so a scan
over the rows of a group is a loop in the program, without shuffles and barriers. Only the scan over groups, of one
number per R rows, is one of Triton's.
"""

import triton
import triton.language as tl

from kernels.phase_scan.phases import cos_sin, lost, to_turns


@triton.jit
def columns_of(column, BD: tl.constexpr):
    """Return the channels of a program, [1, BD]; a thread gets four of eight groups, or two of four, in one load."""
    return tl.max_contiguous(column + tl.arange(0, BD), 4)[None, :]


@triton.jit
def rows_at(r, R: tl.constexpr, G: tl.constexpr):
    """Return the rows at place r of the groups, [G, 1]."""
    return (tl.arange(0, G) * R + r)[:, None]


@triton.jit
def inside_of(rows, columns, left, D: tl.constexpr, BD: tl.constexpr):
    """Return which of the rows and channels exist; without `left`, all rows do."""
    if left is None:
        return (rows >= 0) & (columns < D)
    elif D % BD == 0:
        return rows < left
    else:
        return (rows < left) & (columns < D)


@triton.jit
def load_rows(
    x, r, row, left, column, STRIDE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr
):
    """Load place r of a tile from `row` on, of which `left` rows exist, for BD of D channels; zeros elsewhere."""
    rows = rows_at(r, R, G)
    columns = columns_of(column, BD)
    places = x + row * STRIDE + rows * STRIDE + columns
    if left is None and D % BD == 0:
        return tl.load(places)
    else:
        return tl.load(places, mask=inside_of(rows, columns, left, D, BD), other=0.0)


@triton.jit
def store_rows(
    x,
    values,
    r,
    row,
    left,
    column,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
):
    """Store what `load_rows` loads."""
    rows = rows_at(r, R, G)
    columns = columns_of(column, BD)
    places = x + row * STRIDE + rows * STRIDE + columns
    if left is None and D % BD == 0:
        tl.store(places, values.to(x.dtype.element_ty))
    else:
        tl.store(places, values.to(x.dtype.element_ty), mask=inside_of(rows, columns, left, D, BD))


@triton.jit
def load_channels(x, row, column, D: tl.constexpr, G: tl.constexpr, BD: tl.constexpr):
    """Load BD channels of a row in fp32 for each group, [G, BD], as the kernels hold tiles: no barrier is needed."""
    columns = columns_of(column, BD) + tl.zeros([G, 1], tl.int32)
    return tl.load(x + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def store_channels(x, values, row, column, D: tl.constexpr, G: tl.constexpr, BD: tl.constexpr):
    """Store BD channels of a row, [1, BD] or the first group of [G, BD].

    Their bits may be those of an integer, so nothing is added to them: a sum has other bits where they look like a NaN.
    """
    columns = columns_of(column, BD) + tl.zeros([G, 1], tl.int32)
    inside = (tl.arange(0, G) == 0)[:, None] & (columns < D)
    tl.store(x + row * D + columns, tl.broadcast_to(values, [G, BD]), mask=inside)


@triton.jit
def keep_rows(
    states,
    last_GD,
    slot,
    part,
    PARTS: tl.constexpr,
    done,
    length,
    column,
    KEEP: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
):
    """Store one part of the states after the last rows of groups, where a multiple of KEEP rows of the sequence ends.

    The tile begins after `done` of `length` rows, and R divides KEEP. Nothing is kept after the last row.
    """
    end = done + (tl.arange(0, G) + 1) * R
    places = states + ((slot + end // KEEP) * PARTS + part)[:, None] * D + columns_of(column, BD)
    kept = ((end % KEEP == 0) & (end < length))[:, None]
    tl.store(places, last_GD, mask=kept & (columns_of(column, BD) < D))


@triton.jit
def group_of(x, g: tl.constexpr, G: tl.constexpr):
    """Return one group of [G, BD], as [1, BD]."""
    return tl.sum(tl.where((tl.arange(0, G) == g)[:, None], x, 0), 0, keep_dims=True)


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


@triton.jit
def load_phases(omega, phase, row, left, column, D: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr):
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
def directions(phase_RGD, R: tl.constexpr, COMPILED: tl.constexpr):
    """Return cosines and sines of phases."""
    cos_RGD = ()
    sin_RGD = ()
    for r in tl.static_range(R):
        cos_GD, sin_GD = cos_sin(phase_RGD[r], COMPILED)
        cos_RGD = cos_RGD + (cos_GD,)
        sin_RGD = sin_RGD + (sin_GD,)
    return cos_RGD, sin_RGD


@triton.jit
def load_direction(
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
