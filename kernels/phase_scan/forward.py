# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""The kernel of the forward: a program carries the memory of BD channels through a sequence, C rows at a time.

It computes in the frame of the first position: with the cumulative phase p_t, written values turn by p_t, their scan
has real gates, and what is read turns back. For the backward it keeps the memory and the phase before each tile there,
of KEEP rows.

Shapes: T rows of the input, D channels, N sequences, C = R G rows of a tile, BD channels of a program, P parts of a
state: real and imaginary part, and the sum of masses. Tiles are tuples, as in `tiles.py`.
"""

import triton
import triton.language as tl

from kernels.gated_delta.tiles import first_slot
from kernels.phase_scan.gates import gates, log_product
from kernels.phase_scan.loads import directions, load_inputs, written
from kernels.phase_scan.phases import cos_sin
from kernels.phase_scan.scans import scan, scan_two
from kernels.phase_scan.tiles import keep_rows, load_channels, store_channels, store_rows


@triton.jit(do_not_specialize=["T"])
def compute_outputs(
    x,
    omega,
    mass,
    log_decay,
    read_offset,
    write_offset,
    initial,
    y,
    final,
    states,
    cu_seqlens,
    T,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    NORM: tl.constexpr,
    IMAGINARY: tl.constexpr,
    FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    KEEP: tl.constexpr,
    EVEN: tl.constexpr,
    COMPILED: tl.constexpr,
):
    """Compute outputs, final states and the states before tiles; one program per sequence and BD channels."""
    C: tl.constexpr = R * G
    P: tl.constexpr = 3 if NORM else 2
    WIDTH: tl.constexpr = 2 * D if IMAGINARY else D
    blocks: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    column = (program % blocks) * BD
    n = program // blocks
    slot, start, length = first_slot(n, cu_seqlens, T, KEEP, PACKED)
    head = n.to(tl.int64) * P
    s_re = tl.zeros([G, BD], tl.float32)
    s_im = tl.zeros([G, BD], tl.float32)
    s_mass = tl.zeros([G, BD], tl.float32)
    phase = tl.zeros([G, BD], tl.int32)
    if initial is not None:
        s_re += load_channels(initial, head, column, D, G, BD)
        s_im += load_channels(initial, head + 1, column, D, G, BD)
        if NORM:
            s_mass += load_channels(initial, head + 2, column, D, G, BD)
    channel_decay = None
    if PER_CHANNEL:
        channel_decay = load_channels(log_decay, 0, column, D, G, BD)
    if length > 0:
        store_channels(states, s_re, slot * (P + 1), column, D, G, BD)
        store_channels(states, s_im, slot * (P + 1) + 1, column, D, G, BD)
        store_channels(states, phase.to(tl.float32, bitcast=True), slot * (P + 1) + P, column, D, G, BD)
        if NORM:
            store_channels(states, s_mass, slot * (P + 1) + 2, column, D, G, BD)
    inputs = x, omega, mass, None if PER_CHANNEL else log_decay, read_offset, write_offset
    tiles = tl.cdiv(length, C)
    ahead = load_inputs(inputs, start, None if EVEN else length, column, D, R, G, BD)
    for tile in range(0, tiles):
        row = start + tile * C
        left = None if EVEN else length - tile * C
        x_RGD, omega_RGD, mass_RGD, log_RGD, read_RGD, write_RGD = ahead
        later = tl.minimum(tile + 1, tiles - 1) * C
        ahead = load_inputs(inputs, start + later, None if EVEN else length - later, column, D, R, G, BD)
        phase_RGD, phase, lost_RGD, write_re_RGD, write_im_RGD, read_re_RGD, read_im_RGD = directions(
            omega_RGD, read_RGD, write_RGD, phase, read_offset is not None, write_offset is not None, R, G, BD, COMPILED
        )
        _, mass_RGD, u_re_RGD, u_im_RGD = written(
            x_RGD, mass_RGD, lost_RGD, write_re_RGD, write_im_RGD, left, mass is not None, R, G
        )
        gate_RGD = None
        passed = None
        if log_decay is not None:
            gate_RGD, log_RGD = gates(log_RGD, channel_decay, left, R, G, COMPILED)
            passed = log_product(log_RGD, channel_decay, left, R, G)
        h_re_RGD, h_im_RGD, s_re, s_im = scan_two(gate_RGD, passed, u_re_RGD, u_im_RGD, s_re, s_im, False, False, R, G)
        if NORM:
            h_mass_RGD, s_mass = scan(gate_RGD, passed, mass_RGD, s_mass, False, False, R, G)
            keep_rows(states, h_mass_RGD[R - 1], slot, 2, P + 1, tile * C, length, column, KEEP, D, R, G, BD)
        keep_rows(states, h_re_RGD[R - 1], slot, 0, P + 1, tile * C, length, column, KEEP, D, R, G, BD)
        keep_rows(states, h_im_RGD[R - 1], slot, 1, P + 1, tile * C, length, column, KEEP, D, R, G, BD)
        last_GD = phase_RGD[R - 1].to(tl.float32, bitcast=True)
        keep_rows(states, last_GD, slot, P, P + 1, tile * C, length, column, KEEP, D, R, G, BD)
        for r in tl.static_range(R):
            y_GD = read_re_RGD[r] * h_re_RGD[r] + read_im_RGD[r] * h_im_RGD[r]
            y_im_GD = read_re_RGD[r] * h_im_RGD[r] - read_im_RGD[r] * h_re_RGD[r]
            if NORM:
                factor_GD = 1.0 / (h_mass_RGD[r] + EPSILON)
                y_GD *= factor_GD
                y_im_GD *= factor_GD
            store_rows(y, y_GD, r, row, left, column, WIDTH, D, R, G, BD)
            if IMAGINARY:
                store_rows(y + D, y_im_GD, r, row, left, column, WIDTH, D, R, G, BD)
    if FINAL:
        cos_GD, sin_GD = cos_sin(phase, COMPILED)
        store_channels(final, cos_GD * s_re + sin_GD * s_im, head, column, D, G, BD)
        store_channels(final, cos_GD * s_im - sin_GD * s_re, head + 1, column, D, G, BD)
        if NORM:
            store_channels(final, s_mass, head + 2, column, D, G, BD)
