# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""The kernel of the backward: one sweep from the last tile to the first, in which each tile computes its memory again.

With a cotangent g of the complex outputs, and in the frame of a tile: H the memory, a the gates, U what is written,
P_t = a_t H_{t-1} = H_t - U_t, p the phase of what is read and q that of what is written:

    mu_t = g_t exp(i p_t) + a_{t+1} mu_{t+1}                    the cotangent of H_t
    d(m_t x_t) = Re(conj(mu_t) exp(i q_t))                      dwrite_offset_t = -Im(conj(mu_t) U_t)
    domega_t = Im(conj(mu_t) P_t)                               dlog_decay_t = Re(conj(mu_t) P_t)
    dread_offset_t = Im(conj(g_t) H_t exp(-i p_t))

No cumulative sum over the whole sequence appears, and no difference of large numbers.

Shapes: as in `forward.py`.
"""

import triton
import triton.language as tl

from kernels.gated_delta.tiles import first_slot, load_tile, store_tile
from kernels.phase_scan.forward import channel_gates, load_gates, load_row, store_row
from kernels.phase_scan.phases import cos_sin, cumulative, to_turns, total
from kernels.phase_scan.scans import row_of, scan_one, scan_one_before, scan_two, scan_two_before


@triton.jit(do_not_specialize=["T"])
def compute_gradients(
    x,
    omega,
    mass,
    log_decay,
    read_offset,
    write_offset,
    initial,
    states,
    dy,
    dfinal,
    dx,
    domega,
    dmass,
    dlog_decay,
    dread_offset,
    dwrite_offset,
    dinitial,
    cu_seqlens,
    T,
    EPSILON: tl.constexpr,
    D: tl.constexpr,
    BD: tl.constexpr,
    C: tl.constexpr,
    DECAY: tl.constexpr,
    NORM: tl.constexpr,
    IMAGINARY: tl.constexpr,
    PACKED: tl.constexpr,
    COMPILED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute all gradients; one program per sequence and BD channels. That of a log_decay [D] is one per sequence."""
    P: tl.constexpr = 3 if NORM else 2
    WIDTH: tl.constexpr = 2 * D if IMAGINARY else D
    blocks: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    column = (program % blocks) * BD
    n = program // blocks
    slot, start, length = first_slot(n, cu_seqlens, T, C, PACKED)
    head = n.to(tl.int64) * P
    inside_CD = tl.arange(0, C)[:, None] + tl.zeros([C, BD], tl.int32)
    mu_re = tl.zeros([BD], tl.float32)
    mu_im = tl.zeros([BD], tl.float32)
    mu_mass = tl.zeros([BD], tl.float32)
    dchannel = tl.zeros([BD], tl.float32)
    if dfinal is not None:
        mu_re += load_row(dfinal, head, column, D, BD)
        mu_im += load_row(dfinal, head + 1, column, D, BD)
        if NORM:
            mu_mass += load_row(dfinal, head + 2, column, D, BD)
    tiles = tl.cdiv(length, C)
    for back in tl.range(0, tiles, num_stages=STAGES):
        tile = tiles - 1 - back
        row = start + tile * C
        left = length - tile * C
        at = (slot + tile) * P
        x_CD = load_tile(x, row, left, column, D, D, C, BD).to(tl.float32)
        step_CD = to_turns(load_tile(omega, row, left, column, D, D, C, BD))
        g_re_CD = load_tile(dy, row, left, column, WIDTH, D, C, BD).to(tl.float32)
        phase_CD = cumulative(step_CD, COMPILED)
        gate_CD, later_CD = x_CD, x_CD
        if DECAY == "channel":
            gate_CD = channel_gates(log_decay, left, column, 0, D, C, BD)
            later_CD = channel_gates(log_decay, left, column, 1, D, C, BD)
        if DECAY == "input":
            gate_CD = load_gates(log_decay, row, left, column, 0, D, C, BD)
            later_CD = load_gates(log_decay, row, left, column, 1, D, C, BD)
        u_CD = x_CD
        if mass is not None:
            mass_CD = load_tile(mass, row, left, column, D, D, C, BD).to(tl.float32)
            u_CD = x_CD * mass_CD
        else:
            mass_CD = tl.where(inside_CD < left, 1.0, 0.0)
        cos_CD, sin_CD = cos_sin(phase_CD, COMPILED)
        cos_write_CD, sin_write_CD = cos_CD, sin_CD
        if write_offset is not None:
            offset_CD = to_turns(load_tile(write_offset, row, left, column, D, D, C, BD))
            cos_write_CD, sin_write_CD = cos_sin(phase_CD + offset_CD, COMPILED)
        if read_offset is not None:
            offset_CD = to_turns(load_tile(read_offset, row, left, column, D, D, C, BD))
            cos_CD, sin_CD = cos_sin(phase_CD + offset_CD, COMPILED)
        u_re_CD, u_im_CD = u_CD * cos_write_CD, u_CD * sin_write_CD
        s_re, s_im = load_row(states, at, column, D, BD), load_row(states, at + 1, column, D, BD)
        p_re_CD, p_im_CD = scan_two_before(gate_CD, u_re_CD, u_im_CD, s_re, s_im, DECAY != "none")
        h_re_CD, h_im_CD = p_re_CD + u_re_CD, p_im_CD + u_im_CD
        g_im_CD = tl.zeros_like(g_re_CD)
        if IMAGINARY:
            g_im_CD = load_tile(dy + D, row, left, column, WIDTH, D, C, BD).to(tl.float32)
        z_re_CD = cos_CD * h_re_CD + sin_CD * h_im_CD
        z_im_CD = cos_CD * h_im_CD - sin_CD * h_re_CD
        if NORM:
            s_mass = load_row(states, at + 2, column, D, BD)
            p_mass_CD = scan_one_before(gate_CD, mass_CD, s_mass, DECAY != "none")
            factor_CD = 1.0 / (p_mass_CD + mass_CD + EPSILON)
            g_re_CD *= factor_CD
            g_im_CD *= factor_CD
            dsum_CD = -(g_re_CD * z_re_CD + g_im_CD * z_im_CD) * factor_CD
            dsum_CD = scan_one(later_CD, dsum_CD, mu_mass, True, DECAY != "none")
            mu_mass = row_of(dsum_CD, 0, C)
        if read_offset is not None:
            dread_CD = g_re_CD * z_im_CD - g_im_CD * z_re_CD
            store_tile(dread_offset, dread_CD, row, left, column, D, D, C, BD)
        b_re_CD = g_re_CD * cos_CD - g_im_CD * sin_CD
        b_im_CD = g_re_CD * sin_CD + g_im_CD * cos_CD
        cos_D, sin_D = cos_sin(total(step_CD, COMPILED), COMPILED)
        later_re, later_im = cos_D * mu_re - sin_D * mu_im, sin_D * mu_re + cos_D * mu_im
        mu_re_CD, mu_im_CD = scan_two(later_CD, b_re_CD, b_im_CD, later_re, later_im, True, DECAY != "none")
        mu_re, mu_im = row_of(mu_re_CD, 0, C), row_of(mu_im_CD, 0, C)
        domega_CD = mu_re_CD * p_im_CD - mu_im_CD * p_re_CD
        store_tile(domega, domega_CD, row, left, column, D, D, C, BD)
        du_CD = mu_re_CD * cos_write_CD + mu_im_CD * sin_write_CD
        if mass is not None:
            store_tile(dx, du_CD * mass_CD, row, left, column, D, D, C, BD)
            dmass_CD = du_CD * x_CD
            if NORM:
                dmass_CD += dsum_CD
            store_tile(dmass, dmass_CD, row, left, column, D, D, C, BD)
        else:
            store_tile(dx, du_CD, row, left, column, D, D, C, BD)
        if write_offset is not None:
            dwrite_CD = mu_im_CD * u_re_CD - mu_re_CD * u_im_CD
            store_tile(dwrite_offset, dwrite_CD, row, left, column, D, D, C, BD)
        if DECAY != "none":
            dgate_CD = mu_re_CD * p_re_CD + mu_im_CD * p_im_CD
            if NORM:
                dgate_CD += dsum_CD * p_mass_CD
            if DECAY == "channel":
                dchannel += tl.sum(tl.where(inside_CD < left, dgate_CD, 0.0), 0)
            else:
                store_tile(dlog_decay, dgate_CD, row, left, column, D, D, C, BD)
    if DECAY == "channel":
        store_row(dlog_decay, dchannel, n.to(tl.int64), column, D, BD)
    if initial is not None:
        if DECAY != "none":
            first = start if DECAY == "input" else start * 0
            columns = column + tl.arange(0, BD)
            inside = (columns < D) & (columns * 0 < length)
            gate_D = tl.exp(tl.load(log_decay + first * D + columns, mask=inside, other=0.0).to(tl.float32))
            mu_re *= gate_D
            mu_im *= gate_D
            mu_mass *= gate_D
        store_row(dinitial, mu_re, head, column, D, BD)
        store_row(dinitial, mu_im, head + 1, column, D, BD)
        if NORM:
            store_row(dinitial, mu_mass, head + 2, column, D, BD)
