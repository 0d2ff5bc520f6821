# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""The kernel of the forward: a program carries the memory of BD channels through a sequence, C rows at a time.

It computes in the frame of the first position: with the cumulative phase p_t, written values turn by p_t, their scan
has real gates, and what is read turns back. The memory and the phase before each tile are kept for the backward.

Shapes: T rows of the input, D channels, N sequences, C = R G rows of a tile, BD channels of a program, P parts of a
state: real and imaginary part, and the sum of masses. Tiles are [R, G, BD], as in `tiles.py`.
"""

import triton
import triton.language as tl

from kernels.gated_delta.tiles import first_slot
from kernels.phase_scan.gates import tile_gates
from kernels.phase_scan.phases import cos_sin, to_turns
from kernels.phase_scan.scans import complex_scan, cumulative_phase, scan
from kernels.phase_scan.tiles import load_channels, load_tile, row_of, rows_of_tile, store_channels, store_tile


@triton.jit
def load_written(
    x,
    mass,
    row,
    left,
    column,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
):
    """Return values, masses and their product; the mass of a row is 1 if there are none, and 0 if there is no row."""
    x_RGD = load_tile(x, row, left, column, D, D, R, G, BD).to(tl.float32)
    if mass is None:
        return x_RGD, tl.where(rows_of_tile(R, G) < left, 1.0, 0.0) + tl.zeros_like(x_RGD), x_RGD
    else:
        mass_RGD = load_tile(mass, row, left, column, D, D, R, G, BD).to(tl.float32)
        return x_RGD, mass_RGD, x_RGD * mass_RGD


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
        offset_RGD = to_turns(load_tile(offset, row, left, column, D, D, R, G, BD))
        return cos_sin(phase_RGD + offset_RGD, COMPILED)


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
    phase = tl.zeros([1, 1, BD], tl.int32)
    if initial is not None:
        s_re += load_channels(initial, head, column, D, BD)
        s_im += load_channels(initial, head + 1, column, D, BD)
        if NORM:
            s_mass += load_channels(initial, head + 2, column, D, BD)
    channel_decay = None
    if PER_CHANNEL:
        channel_decay = load_channels(log_decay, 0, column, D, BD)
    for tile in tl.range(0, tl.cdiv(length, C), num_stages=STAGES):
        row = start + tile * C
        left = length - tile * C
        at = (slot + tile) * (P + 1)
        store_channels(states, s_re, at, column, D, BD)
        store_channels(states, s_im, at + 1, column, D, BD)
        store_channels(states, phase.to(tl.float32, bitcast=True), at + P, column, D, BD)
        _, mass_RGD, u_RGD = load_written(x, mass, row, left, column, D, R, G, BD)
        phase_RGD = cumulative_phase(to_turns(load_tile(omega, row, left, column, D, D, R, G, BD)), phase, R)
        phase = row_of(phase_RGD, R - 1, G - 1, R, G).to(tl.int64).to(tl.int32)
        gate_RGD = None
        passed = None
        if log_decay is not None:
            gate_RGD, passed = tile_gates(log_decay, channel_decay, row, left, column, 0, D, R, G, BD)
        cos_RGD, sin_RGD = cos_sin(phase_RGD, COMPILED)
        # fmt: off
        write_re_RGD, write_im_RGD = load_direction(
            write_offset, phase_RGD, cos_RGD, sin_RGD, row, left, column, D, R, G, BD, COMPILED
        )
        read_re_RGD, read_im_RGD = load_direction(
            read_offset, phase_RGD, cos_RGD, sin_RGD, row, left, column, D, R, G, BD, COMPILED
        )
        h_re_RGD, h_im_RGD, s_re, s_im = complex_scan(
            gate_RGD, passed, u_RGD * write_re_RGD, u_RGD * write_im_RGD, s_re, s_im, False, False, R, G
        )
        # fmt: on
        y_RGD = read_re_RGD * h_re_RGD + read_im_RGD * h_im_RGD
        factor_RGD = tl.full([R, G, BD], 1.0, tl.float32)
        if NORM:
            store_channels(states, s_mass, at + 2, column, D, BD)
            sum_RGD, s_mass = scan(gate_RGD, passed, mass_RGD, s_mass, False, False, R, G)
            factor_RGD = 1.0 / (sum_RGD + EPSILON)
        store_tile(y, y_RGD * factor_RGD, row, left, column, WIDTH, D, R, G, BD)
        if IMAGINARY:
            y_RGD = read_re_RGD * h_im_RGD - read_im_RGD * h_re_RGD
            store_tile(y + D, y_RGD * factor_RGD, row, left, column, WIDTH, D, R, G, BD)
    if FINAL:
        cos_D, sin_D = cos_sin(phase, COMPILED)
        store_channels(final, cos_D * s_re + sin_D * s_im, head, column, D, BD)
        store_channels(final, cos_D * s_im - sin_D * s_re, head + 1, column, D, BD)
        if NORM:
            store_channels(final, s_mass, head + 2, column, D, BD)
