# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""The kernel of the forward: a program carries the memory of BD channels through a sequence, a tile of C rows at a time.

In a tile, the frame of the phase is that of its first row. With the phase p_t since then, written values turn by p_t,
their scan has real gates, and what is read turns back. The state before each tile is kept for the backward.

Shapes: T rows of the input, D channels, N sequences, C rows of a tile, BD channels of a program, P parts of a state:
real and imaginary part, and the sum of masses.
"""

import triton
import triton.language as tl

from kernels.gated_delta.tiles import first_slot, load_tile, store_tile
from kernels.phase_scan.phases import cos_sin, cumulative, to_turns, total
from kernels.phase_scan.scans import row_of, scan_one, scan_two


@triton.jit
def load_gates(log_decay, row, left, column, shift, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """Load gates of the rows from `row` + `shift` on; 1 where there is no row. log_decay is [T, D]."""
    return tl.exp(load_tile(log_decay, row + shift, left - shift, column, D, D, C, BD).to(tl.float32))


@triton.jit
def channel_gates(log_decay, left, column, shift, D: tl.constexpr, C: tl.constexpr, BD: tl.constexpr):
    """Return the same for a log_decay [D]."""
    columns = column + tl.arange(0, BD)
    log_decay_D = tl.load(log_decay + columns, mask=columns < D, other=0.0).to(tl.float32)
    inside = (tl.arange(0, C) < left - shift)[:, None]
    return tl.exp(tl.where(inside, log_decay_D[None, :], 0.0))


@triton.jit
def load_row(x, row, column, D: tl.constexpr, BD: tl.constexpr):
    """Load BD of the D channels of a row."""
    columns = column + tl.arange(0, BD)
    return tl.load(x + row * D + columns, mask=columns < D, other=0.0)


@triton.jit
def store_row(x, values, row, column, D: tl.constexpr, BD: tl.constexpr):
    """Store what `load_row` loads."""
    columns = column + tl.arange(0, BD)
    tl.store(x + row * D + columns, values, mask=columns < D)


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
    C: tl.constexpr,
    DECAY: tl.constexpr,
    NORM: tl.constexpr,
    IMAGINARY: tl.constexpr,
    FINAL: tl.constexpr,
    PACKED: tl.constexpr,
    COMPILED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute outputs, final states and the states before tiles; one program per sequence and BD channels."""
    P: tl.constexpr = 3 if NORM else 2
    WIDTH: tl.constexpr = 2 * D if IMAGINARY else D
    blocks: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    column = (program % blocks) * BD
    n = program // blocks
    slot, start, length = first_slot(n, cu_seqlens, T, C, PACKED)
    head = n.to(tl.int64) * P
    s_re = tl.zeros([BD], tl.float32)
    s_im = tl.zeros([BD], tl.float32)
    s_mass = tl.zeros([BD], tl.float32)
    if initial is not None:
        s_re += load_row(initial, head, column, D, BD)
        s_im += load_row(initial, head + 1, column, D, BD)
        if NORM:
            s_mass += load_row(initial, head + 2, column, D, BD)
    for tile in tl.range(0, tl.cdiv(length, C), num_stages=STAGES):
        row = start + tile * C
        left = length - tile * C
        at = (slot + tile) * P
        store_row(states, s_re, at, column, D, BD)
        store_row(states, s_im, at + 1, column, D, BD)
        if NORM:
            store_row(states, s_mass, at + 2, column, D, BD)
        u_CD = load_tile(x, row, left, column, D, D, C, BD).to(tl.float32)
        step_CD = to_turns(load_tile(omega, row, left, column, D, D, C, BD))
        phase_CD = cumulative(step_CD, COMPILED)
        gate_CD = u_CD
        if DECAY == "channel":
            gate_CD = channel_gates(log_decay, left, column, 0, D, C, BD)
        if DECAY == "input":
            gate_CD = load_gates(log_decay, row, left, column, 0, D, C, BD)
        if mass is not None:
            mass_CD = load_tile(mass, row, left, column, D, D, C, BD).to(tl.float32)
            u_CD *= mass_CD
        else:
            mass_CD = tl.where((tl.arange(0, C) < left)[:, None], 1.0, 0.0) + tl.zeros_like(u_CD)
        cos_CD, sin_CD = cos_sin(phase_CD, COMPILED)
        if write_offset is not None:
            offset_CD = to_turns(load_tile(write_offset, row, left, column, D, D, C, BD))
            cos_write_CD, sin_write_CD = cos_sin(phase_CD + offset_CD, COMPILED)
            re_CD, im_CD = u_CD * cos_write_CD, u_CD * sin_write_CD
        else:
            re_CD, im_CD = u_CD * cos_CD, u_CD * sin_CD
        re_CD, im_CD = scan_two(gate_CD, re_CD, im_CD, s_re, s_im, False, DECAY != "none")
        if read_offset is not None:
            offset_CD = to_turns(load_tile(read_offset, row, left, column, D, D, C, BD))
            cos_CD, sin_CD = cos_sin(phase_CD + offset_CD, COMPILED)
        y_CD = cos_CD * re_CD + sin_CD * im_CD
        if IMAGINARY:
            y_im_CD = cos_CD * im_CD - sin_CD * re_CD
        if NORM:
            sum_CD = scan_one(gate_CD, mass_CD, s_mass, False, DECAY != "none")
            s_mass = row_of(sum_CD, C - 1, C)
            y_CD /= sum_CD + EPSILON
            if IMAGINARY:
                y_im_CD /= sum_CD + EPSILON
        store_tile(y, y_CD, row, left, column, WIDTH, D, C, BD)
        if IMAGINARY:
            store_tile(y + D, y_im_CD, row, left, column, WIDTH, D, C, BD)
        cos_D, sin_D = cos_sin(total(step_CD, COMPILED), COMPILED)
        last_re, last_im = row_of(re_CD, C - 1, C), row_of(im_CD, C - 1, C)
        s_re = cos_D * last_re + sin_D * last_im
        s_im = cos_D * last_im - sin_D * last_re
    if FINAL:
        store_row(final, s_re, head, column, D, BD)
        store_row(final, s_im, head + 1, column, D, BD)
        if NORM:
            store_row(final, s_mass, head + 2, column, D, BD)
