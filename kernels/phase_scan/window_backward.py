# ruff: noqa: RUF005  (Triton has no unpacking in tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, assignment"
"""The kernel of the backward with a window: one sweep from the last tile to the first.

With U_t what is written, b_t = g_t exp(i p_t) for a cotangent g of the complex outputs, and the phases p and q of
reader and writer:

    H_t = U_(t-W+1) + ... + U_t                    mu_t = b_t + ... + b_(t+W-1)
    d(m_t x_t) = Re(conj(mu_t) exp(i q_t))         dread_offset_t = Im(conj(b_t) H_t)
    dwrite_offset_t = -Im(conj(mu_t) U_t)          domega_t = domega_(t+1) + dread_offset_t + dwrite_offset_t

H is that of the forward, with a late stream. mu is its mirror image, with an *early* stream W rows behind. The sum for
domega is over pairs of rows of which one is before t and one is not, and would cancel over a whole sequence. So it
begins again after each tile from the pairs across its end, if these are of one chunk (Q = 1), and is carried in fp64 if
a window is longer than a tile.

Shapes: as in `forward.py`.
"""

import triton
import triton.language as tl

from kernels.phase_scan.loads import directions, load_inputs, written
from kernels.phase_scan.scans import scan
from kernels.phase_scan.tiles import load_channels, rows_at, store_rows
from kernels.phase_scan.window_loads import load_cotangents, load_reads, load_terms, load_writes, store_terms
from kernels.phase_scan.window_tiles import phase_at, sums_beside, tile_rows, total, window_slot


@triton.jit
def _store_gradients(
    x,
    omega,
    mass,
    read_offset,
    write_offset,
    initial,
    states,
    dy,
    dx,
    domega,
    dmass,
    dread_offset,
    dwrite_offset,
    n,
    tile,
    tiles,
    slot,
    start,
    length,
    column,
    s_re,
    s_im,
    across,
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
    """Compute one tile; return the sum of b over W rows from its start on, and domega there."""
    first, rows = tile_rows(tile, W, L, Q)
    row = start + first
    left = tl.minimum(length - first, rows)
    at = (slot + tile) * 4
    phase = load_channels(states, at + 2, column, D, G, BD).to(tl.int32, bitcast=True)
    x_RGD, omega_RGD, mass_RGD, _, read_RGD, write_RGD = load_inputs(
        (x, omega, mass, None, read_offset, write_offset), row, left, column, D, R, G, BD
    )
    phase_RGD, _, _, write_re_RGD, write_im_RGD, read_re_RGD, read_im_RGD = directions(
        omega_RGD, read_RGD, write_RGD, phase, read_offset is not None, write_offset is not None, R, G, BD, COMPILED
    )
    x_RGD, mass_RGD, u_re_RGD, u_im_RGD = written(
        x_RGD, mass_RGD, None, write_re_RGD, write_im_RGD, left, mass is not None, R, G
    )
    b_re_RGD, b_im_RGD = load_cotangents(dy, read_re_RGD, read_im_RGD, row, left, column, D, R, G, BD, IMAGINARY)
    h_re_RGD = sums_beside(u_re_RGD, False, W, L, R, G, BD)
    h_im_RGD = sums_beside(u_im_RGD, False, W, L, R, G, BD)
    if LATE or initial is not None:
        if LATE:
            late_phase = load_channels(states, at + 3, column, D, G, BD).to(tl.int32, bitcast=True)
            late_left = tl.minimum(length - first + W, rows)
            late_re_RGD, late_im_RGD, _ = load_writes(
                x, omega, mass, write_offset, late_phase, row - W, late_left, column, D, R, G, BD, COMPILED
            )
        else:
            late_re_RGD, late_im_RGD = load_terms(initial, n, first, rows, column, W, D, R, G, BD)
        rest_re_RGD = sums_beside(late_re_RGD, True, W, L, R, G, BD)
        rest_im_RGD = sums_beside(late_im_RGD, True, W, L, R, G, BD)
    if Q > 1:
        early_at = (slot + tl.minimum(tile + Q, tiles - 1)) * 4 + 2
        early_phase = load_channels(states, early_at, column, D, G, BD).to(tl.int32, bitcast=True)
    else:
        early_phase = phase_at(phase_RGD, W - 1, R, G)
    early_left = tl.minimum(length - first - W, rows)
    early_re_RGD, early_im_RGD = load_reads(
        omega, read_offset, dy, early_phase, row + W, early_left, column, D, R, G, BD, IMAGINARY, COMPILED
    )
    more_re_RGD = sums_beside(early_re_RGD, False, W, L, R, G, BD)
    more_im_RGD = sums_beside(early_im_RGD, False, W, L, R, G, BD)
    mu_re_RGD = sums_beside(b_re_RGD, True, W, L, R, G, BD)
    mu_im_RGD = sums_beside(b_im_RGD, True, W, L, R, G, BD)
    if Q > 1:
        s_re -= total(early_re_RGD, R)
        s_im -= total(early_im_RGD, R)
        n_re, n_im = s_re.to(tl.float32), s_im.to(tl.float32)
        m_re, m_im = load_channels(states, at, column, D, G, BD), load_channels(states, at + 1, column, D, G, BD)
        s_re += total(b_re_RGD, R)
        s_im += total(b_im_RGD, R)
    step_RGD = ()
    pair_GD = tl.zeros([G, BD], tl.float32)
    for r in tl.static_range(R):
        h_re_GD, h_im_GD = h_re_RGD[r] + u_re_RGD[r], h_im_RGD[r] + u_im_RGD[r]
        mu_re_GD = mu_re_RGD[r] + b_re_RGD[r] + more_re_RGD[r]
        mu_im_GD = mu_im_RGD[r] + b_im_RGD[r] + more_im_RGD[r]
        if LATE or initial is not None:
            h_re_GD += rest_re_RGD[r]
            h_im_GD += rest_im_RGD[r]
        if Q > 1:
            h_re_GD += m_re
            h_im_GD += m_im
            mu_re_GD += n_re
            mu_im_GD += n_im
        else:  # pairs across the end of the tile are of its last chunk and the next
            across_GD = more_re_RGD[r] * u_im_RGD[r] - more_im_RGD[r] * u_re_RGD[r]
            pair_GD += tl.where(rows_at(r, R, G) >= rows - W, across_GD, 0.0)
        dread_GD = b_re_RGD[r] * h_im_GD - b_im_RGD[r] * h_re_GD
        dwrite_GD = mu_im_GD * u_re_RGD[r] - mu_re_GD * u_im_RGD[r]
        step_RGD = step_RGD + (dread_GD + dwrite_GD,)
        du_GD = mu_re_GD * write_re_RGD[r] + mu_im_GD * write_im_RGD[r]
        if mass is None:
            store_rows(dx, du_GD, r, row, left, column, D, D, R, G, BD)
        else:
            store_rows(dx, du_GD * mass_RGD[r], r, row, left, column, D, D, R, G, BD)
            store_rows(dmass, du_GD * x_RGD[r], r, row, left, column, D, D, R, G, BD)
        if read_offset is not None:
            store_rows(dread_offset, dread_GD, r, row, left, column, D, D, R, G, BD)
        if write_offset is not None:
            store_rows(dwrite_offset, dwrite_GD, r, row, left, column, D, D, R, G, BD)
    if Q == 1:
        across = tl.sum(pair_GD, 0, keep_dims=True).to(tl.float64)
    domega_RGD, _ = scan(None, None, step_RGD, across.to(tl.float32), False, True, R, G)
    for r in tl.static_range(R):
        store_rows(domega, domega_RGD[r], r, row, left, column, D, D, R, G, BD)
    return s_re, s_im, across + total(step_RGD, R)


@triton.jit(do_not_specialize=["T"])
def compute_window_gradients(
    x,
    omega,
    mass,
    read_offset,
    write_offset,
    initial,
    states,
    dy,
    dx,
    domega,
    dmass,
    dread_offset,
    dwrite_offset,
    dinitial,
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
    """Compute all gradients; one program per sequence and BD channels."""
    blocks: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    column = (program % blocks) * BD
    n = program // blocks
    slot, start, length, tiles = window_slot(n, cu_seqlens, T, W, L, Q, PACKED)
    s_re = tl.zeros([1, BD], tl.float64)
    s_im = tl.zeros([1, BD], tl.float64)
    across = tl.zeros([1, BD], tl.float64)
    # fmt: off
    for back in tl.range(0, tiles - Q, num_stages=STAGES):
        s_re, s_im, across = _store_gradients(
            x, omega, mass, read_offset, write_offset, None, states, dy, dx, domega, dmass, dread_offset, dwrite_offset,
            n, tiles - 1 - back, tiles, slot, start, length, column, s_re, s_im, across,
            True, W, L, Q, D, BD, R, G, IMAGINARY, COMPILED,
        )
    last = tl.minimum(tiles, Q) - 1
    for back in tl.range(0, last + 1, num_stages=STAGES):
        s_re, s_im, across = _store_gradients(
            x, omega, mass, read_offset, write_offset, initial, states, dy, dx, domega, dmass, dread_offset,
            dwrite_offset, n, last - back, tiles, slot, start, length, column, s_re, s_im, across,
            False, W, L, Q, D, BD, R, G, IMAGINARY, COMPILED,
        )
    # fmt: on
    if initial is not None:  # a term counts in the rows of the first chunk before its own place there
        for back in range(0, Q):
            first, rows = tile_rows(Q - 1 - back, W, L, Q)
            left = tl.minimum(length - first, rows)
            early_at = (slot + tl.maximum(tl.minimum(Q - 1 - back, tiles - 1), 0)) * 4 + 2
            phase = load_channels(states, early_at, column, D, G, BD).to(tl.int32, bitcast=True)
            b_re_RGD, b_im_RGD = load_reads(
                omega, read_offset, dy, phase, start + first, left, column, D, R, G, BD, IMAGINARY, COMPILED
            )
            mu_re_RGD = sums_beside(b_re_RGD, False, W, L, R, G, BD)
            mu_im_RGD = sums_beside(b_im_RGD, False, W, L, R, G, BD)
            if Q > 1:
                s_re -= total(b_re_RGD, R)
                s_im -= total(b_im_RGD, R)
            store_terms(dinitial, mu_re_RGD, mu_im_RGD, s_re, s_im, n, first, rows, column, W, D, R, G, BD)
