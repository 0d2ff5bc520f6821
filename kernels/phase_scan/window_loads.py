# ruff: noqa: RUF005  (Triton has no unpacking in tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, assignment"
"""What the kernels with a window load for a tile: what is written, cotangents, and the terms of an initial state.

Shapes: as in `forward.py`.
"""

import triton
import triton.language as tl

from kernels.phase_scan.loads import directions, load_inputs, written
from kernels.phase_scan.tiles import columns_of, load_rows, rows_at


@triton.jit
def load_writes(
    x,
    omega,
    mass,
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
    """Return what a tile of rows writes, real and imaginary part, and the phase after it."""
    x_RGD, omega_RGD, mass_RGD, _, _, write_RGD = load_inputs(
        (x, omega, mass, None, None, write_offset), row, left, column, D, R, G, BD
    )
    _, last_phase, lost_RGD, re_RGD, im_RGD, _, _ = directions(
        omega_RGD, (), write_RGD, phase, False, write_offset is not None, R, G, BD, COMPILED
    )
    _, _, u_re_RGD, u_im_RGD = written(x_RGD, mass_RGD, lost_RGD, re_RGD, im_RGD, left, mass is not None, R, G)
    return u_re_RGD, u_im_RGD, last_phase


@triton.jit
def load_cotangents(
    dy,
    cos_RGD,
    sin_RGD,
    row,
    left,
    column,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
    IMAGINARY: tl.constexpr,
):
    """Return b: cotangents of the outputs, turned by the phases of the reader."""
    WIDTH: tl.constexpr = 2 * D if IMAGINARY else D
    re_RGD = ()
    im_RGD = ()
    for r in tl.static_range(R):
        g_GD = load_rows(dy, r, row, left, column, WIDTH, D, R, G, BD).to(tl.float32)
        if IMAGINARY:
            g_im_GD = load_rows(dy + D, r, row, left, column, WIDTH, D, R, G, BD).to(tl.float32)
            re_RGD = re_RGD + (g_GD * cos_RGD[r] - g_im_GD * sin_RGD[r],)
            im_RGD = im_RGD + (g_GD * sin_RGD[r] + g_im_GD * cos_RGD[r],)
        else:
            re_RGD = re_RGD + (g_GD * cos_RGD[r],)
            im_RGD = im_RGD + (g_GD * sin_RGD[r],)
    return re_RGD, im_RGD


@triton.jit
def load_reads(
    omega,
    read_offset,
    dy,
    phase,
    row,
    left,
    column,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
    IMAGINARY: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Return b of a tile of rows."""
    _, omega_RGD, _, _, read_RGD, _ = load_inputs(
        (None, omega, None, None, read_offset, None), row, left, column, D, R, G, BD
    )
    _, _, _, _, _, cos_RGD, sin_RGD = directions(
        omega_RGD, read_RGD, (), phase, read_offset is not None, False, R, G, BD, COMPILED
    )
    return load_cotangents(dy, cos_RGD, sin_RGD, row, left, column, D, R, G, BD, IMAGINARY)


@triton.jit
def _term_at(
    initial,
    n,
    first,
    rows,
    r,
    column,
    W: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
):
    """Return pointers to the terms W rows before place r of a tile of the first chunk, and where there is one.

    A state [W - 1, 2, D] has no term W rows before the first row, which no window covers.
    """
    place = rows_at(r, R, G)
    columns = columns_of(column, BD)
    inside = (place < rows) & (first + place > 0) & (columns < D)
    term = n.to(tl.int64) * (W - 1) + first + place - 1
    return initial + term * (2 * D) + columns, inside


@triton.jit
def load_terms(
    initial,
    n,
    first,
    rows,
    column,
    W: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
):
    """Return real and imaginary parts of the initial terms that are W rows before a tile of the first chunk."""
    re_RGD = ()
    im_RGD = ()
    for r in tl.static_range(R):
        at, inside = _term_at(initial, n, first, rows, r, column, W, D, R, G, BD)
        re_RGD = re_RGD + (tl.load(at, mask=inside, other=0.0),)
        im_RGD = im_RGD + (tl.load(at + D, mask=inside, other=0.0),)
    return re_RGD, im_RGD


@triton.jit
def store_terms(
    dinitial,
    re_RGD,
    im_RGD,
    s_re,
    s_im,
    n,
    first,
    rows,
    column,
    W: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
):
    """Store what `load_terms` loads: the sums of a tile, and of what is beside it, [1, BD]."""
    for r in tl.static_range(R):
        at, inside = _term_at(dinitial, n, first, rows, r, column, W, D, R, G, BD)
        tl.store(at, re_RGD[r] + s_re.to(tl.float32), mask=inside)
        tl.store(at + D, im_RGD[r] + s_im.to(tl.float32), mask=inside)
