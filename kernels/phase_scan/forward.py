# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""The kernel of the forward: a program carries the memory of BD channels through a sequence, C rows at a time.

In a tile, the frame of the phase is that of its first row. With the phase p_t since then, written values turn by p_t,
their scan has real gates, and what is read turns back. The state before each tile is kept for the backward.

Shapes: T rows of the input, D channels, N sequences, C rows of a tile, BD channels of a program, P parts of a state:
real and imaginary part, and the sum of masses.
"""

import triton
import triton.language as tl

from kernels.gated_delta.tiles import first_slot
from kernels.phase_scan.phases import cos_sin, to_turns
from kernels.phase_scan.scans import complex_scan, cumulative_phase, scan
from kernels.phase_scan.tiles import (
    channel_gates,
    load_channels,
    load_tile,
    row_gates,
    row_of,
    rows_of_tile,
    store_channels,
    store_tile,
)


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
    DECAY: tl.constexpr,
    NORM: tl.constexpr,
    IMAGINARY: tl.constexpr,
    FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    COMPILED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute outputs, final states and the states before tiles; one program per sequence and BD channels."""
    C: tl.constexpr = R * G
    P: tl.constexpr = 3 if NORM else 2
    WIDTH: tl.constexpr = 2 * D if IMAGINARY else D
    blocks: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    column = (program % blocks) * BD
    n = program // blocks
    slot, start, length = first_slot(n, cu_seqlens, T, C, PACKED)
    head = n.to(tl.int64) * P
    s_re = tl.zeros([1, 1, BD], tl.float32)
    s_im = tl.zeros([1, 1, BD], tl.float32)
    s_mass = tl.zeros([1, 1, BD], tl.float32)
    if initial is not None:
        s_re += load_channels(initial, head, column, D, BD)
        s_im += load_channels(initial, head + 1, column, D, BD)
        if NORM:
            s_mass += load_channels(initial, head + 2, column, D, BD)
    for tile in tl.range(0, tl.cdiv(length, C), num_stages=STAGES):
        row = start + tile * C
        left = length - tile * C
        at = (slot + tile) * P
        store_channels(states, s_re, at, column, D, BD)
        store_channels(states, s_im, at + 1, column, D, BD)
        if NORM:
            store_channels(states, s_mass, at + 2, column, D, BD)
        u_RGD = load_tile(x, row, left, column, D, D, R, G, BD).to(tl.float32)
        step_RGD = to_turns(load_tile(omega, row, left, column, D, D, R, G, BD))
        phase_RGD = cumulative_phase(step_RGD, COMPILED, R)
        gate_RGD = u_RGD
        if DECAY == "channel":
            gate_RGD = channel_gates(log_decay, left, column, 0, D, R, G, BD)
        if DECAY == "input":
            gate_RGD = row_gates(log_decay, row, left, column, 0, D, R, G, BD)
        if mass is not None:
            mass_RGD = load_tile(mass, row, left, column, D, D, R, G, BD).to(tl.float32)
            u_RGD *= mass_RGD
        else:
            mass_RGD = tl.where(rows_of_tile(R, G) < left, 1.0, 0.0) + tl.zeros_like(u_RGD)
        cos_RGD, sin_RGD = cos_sin(phase_RGD, COMPILED)
        if write_offset is not None:
            offset_RGD = to_turns(load_tile(write_offset, row, left, column, D, D, R, G, BD))
            cos_write_RGD, sin_write_RGD = cos_sin(phase_RGD + offset_RGD, COMPILED)
            re_RGD, im_RGD = u_RGD * cos_write_RGD, u_RGD * sin_write_RGD
        else:
            re_RGD, im_RGD = u_RGD * cos_RGD, u_RGD * sin_RGD
        re_RGD, im_RGD = complex_scan(gate_RGD, re_RGD, im_RGD, s_re, s_im, False, False, DECAY != "none", R)
        if read_offset is not None:
            offset_RGD = to_turns(load_tile(read_offset, row, left, column, D, D, R, G, BD))
            cos_RGD, sin_RGD = cos_sin(phase_RGD + offset_RGD, COMPILED)
        y_RGD = cos_RGD * re_RGD + sin_RGD * im_RGD
        if IMAGINARY:
            y_im_RGD = cos_RGD * im_RGD - sin_RGD * re_RGD
        if NORM:
            sum_RGD = scan(gate_RGD, mass_RGD, s_mass, False, False, DECAY != "none", R)
            s_mass = row_of(sum_RGD, R - 1, G - 1, R, G)
            y_RGD /= sum_RGD + EPSILON
            if IMAGINARY:
                y_im_RGD /= sum_RGD + EPSILON
        store_tile(y, y_RGD, row, left, column, WIDTH, D, R, G, BD)
        if IMAGINARY:
            store_tile(y + D, y_im_RGD, row, left, column, WIDTH, D, R, G, BD)
        cos_D, sin_D = cos_sin(row_of(phase_RGD, R - 1, G - 1, R, G), COMPILED)
        last_re, last_im = row_of(re_RGD, R - 1, G - 1, R, G), row_of(im_RGD, R - 1, G - 1, R, G)
        s_re = cos_D * last_re + sin_D * last_im
        s_im = cos_D * last_im - sin_D * last_re
    if FINAL:
        store_channels(final, s_re, head, column, D, BD)
        store_channels(final, s_im, head + 1, column, D, BD)
        if NORM:
            store_channels(final, s_mass, head + 2, column, D, BD)
