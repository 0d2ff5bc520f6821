# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, assignment"
"""The kernel of the forward with a window: as `forward.py`, with the late stream that `window_tiles.py` explains.

The late rows are read a second time, W rows after the first. Kept for the backward are, before each tile, the sum over
the whole tiles between it and its late tile, and the phases of both.

Shapes: as in `forward.py`.
"""

import triton
import triton.language as tl

from kernels.phase_scan.loads import directions, load_inputs, written
from kernels.phase_scan.tiles import store_channels, store_rows
from kernels.phase_scan.window_loads import load_terms, load_writes
from kernels.phase_scan.window_tiles import sums_beside, tile_rows, total, window_slot


@triton.jit
def _store_outputs(
    x,
    omega,
    mass,
    read_offset,
    write_offset,
    initial,
    y,
    states,
    n,
    tile,
    slot,
    start,
    length,
    column,
    s_re,
    s_im,
    phase,
    late_phase,
    LATE: tl.constexpr,
    W: tl.constexpr,
    L: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    IMAGINARY: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Compute one tile; return the sum over the W rows up to its end, and the phases of both streams."""
    WIDTH: tl.constexpr = 2 * D if IMAGINARY else D
    first, rows = tile_rows(tile, W, L, Q)
    row = start + first
    left = tl.minimum(length - first, rows)
    at = (slot + tile) * 4
    store_channels(states, phase.to(tl.float32, bitcast=True), at + 2, column, D, G, BD)
    x_RGD, omega_RGD, mass_RGD, _, read_RGD, write_RGD = load_inputs(
        (x, omega, mass, None, read_offset, write_offset), row, left, column, D, R, G, BD
    )
    _, phase, lost_RGD, write_re_RGD, write_im_RGD, read_re_RGD, read_im_RGD = directions(
        omega_RGD, read_RGD, write_RGD, phase, read_offset is not None, write_offset is not None, R, G, BD, COMPILED
    )
    _, _, u_re_RGD, u_im_RGD = written(
        x_RGD, mass_RGD, lost_RGD, write_re_RGD, write_im_RGD, left, mass is not None, R, G
    )
    h_re_RGD = sums_beside(u_re_RGD, False, W, L, R, G, BD)
    h_im_RGD = sums_beside(u_im_RGD, False, W, L, R, G, BD)
    m_re = tl.zeros([1, BD], tl.float32)
    m_im = tl.zeros([1, BD], tl.float32)
    if LATE or initial is not None:
        if LATE:
            store_channels(states, late_phase.to(tl.float32, bitcast=True), at + 3, column, D, G, BD)
            late_left = tl.minimum(length - first + W, rows)
            late_re_RGD, late_im_RGD, late_phase = load_writes(
                x, omega, mass, write_offset, late_phase, row - W, late_left, column, D, R, G, BD, COMPILED
            )
        else:
            late_re_RGD, late_im_RGD = load_terms(initial, n, first, rows, column, W, D, R, G, BD)
        rest_re_RGD = sums_beside(late_re_RGD, True, W, L, R, G, BD)
        rest_im_RGD = sums_beside(late_im_RGD, True, W, L, R, G, BD)
        if Q > 1:
            s_re -= total(late_re_RGD, R)
            s_im -= total(late_im_RGD, R)
    if Q > 1:
        m_re += s_re.to(tl.float32)
        m_im += s_im.to(tl.float32)
        store_channels(states, m_re, at, column, D, G, BD)
        store_channels(states, m_im, at + 1, column, D, G, BD)
        s_re += total(u_re_RGD, R)
        s_im += total(u_im_RGD, R)
    for r in tl.static_range(R):
        h_re_GD, h_im_GD = h_re_RGD[r] + u_re_RGD[r], h_im_RGD[r] + u_im_RGD[r]
        if LATE or initial is not None:
            h_re_GD += rest_re_RGD[r]
            h_im_GD += rest_im_RGD[r]
        if Q > 1:
            h_re_GD += m_re
            h_im_GD += m_im
        y_GD = read_re_RGD[r] * h_re_GD + read_im_RGD[r] * h_im_GD
        store_rows(y, y_GD, r, row, left, column, WIDTH, D, R, G, BD)
        if IMAGINARY:
            y_im_GD = read_re_RGD[r] * h_im_GD - read_im_RGD[r] * h_re_GD
            store_rows(y + D, y_im_GD, r, row, left, column, WIDTH, D, R, G, BD)
    return s_re, s_im, phase, late_phase


@triton.jit(do_not_specialize=["T"])
def compute_window_outputs(
    x,
    omega,
    mass,
    read_offset,
    write_offset,
    initial,
    y,
    states,
    cu_seqlens,
    T,
    W: tl.constexpr,
    L: tl.constexpr,
    Q: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    IMAGINARY: tl.constexpr,
    PACKED: tl.constexpr,
    COMPILED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute outputs and the states before tiles; one program per sequence and BD channels."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    column = (program % blocks) * BD
    n = program // blocks
    slot, start, length, tiles = window_slot(n, cu_seqlens, T, W, L, Q, PACKED)
    s_re = tl.zeros([1, BD], tl.float64)
    s_im = tl.zeros([1, BD], tl.float64)
    phase = tl.zeros([G, BD], tl.int32)
    late_phase = tl.zeros([G, BD], tl.int32)
    if Q > 1 and initial is not None:
        for tile in range(0, Q):
            first, rows = tile_rows(tile, W, L, Q)
            term_re_RGD, term_im_RGD = load_terms(initial, n, first, rows, column, W, D, R, G, BD)
            s_re += total(term_re_RGD, R)
            s_im += total(term_im_RGD, R)
    # fmt: off
    for tile in tl.range(0, tl.minimum(tiles, Q), num_stages=STAGES):
        s_re, s_im, phase, late_phase = _store_outputs(
            x, omega, mass, read_offset, write_offset, initial, y, states, n, tile, slot, start, length, column,
            s_re, s_im, phase, late_phase, False, W, L, Q, D, BD, R, G, IMAGINARY, COMPILED,
        )
    for tile in tl.range(Q, tiles, num_stages=STAGES):
        s_re, s_im, phase, late_phase = _store_outputs(
            x, omega, mass, read_offset, write_offset, None, y, states, n, tile, slot, start, length, column,
            s_re, s_im, phase, late_phase, True, W, L, Q, D, BD, R, G, IMAGINARY, COMPILED,
        )
    # fmt: on
