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

from kernels.gated_delta.tiles import first_slot
from kernels.phase_scan.forward import load_direction, load_written
from kernels.phase_scan.gates import tile_gates
from kernels.phase_scan.phases import cos_sin, to_turns
from kernels.phase_scan.scans import complex_scan, cumulative_phase, scan
from kernels.phase_scan.tiles import load_channels, load_tile, row_of, rows_of_tile, store_channels, store_tile


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
    R: tl.constexpr,
    G: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    NORM: tl.constexpr,
    IMAGINARY: tl.constexpr,
    PACKED: tl.constexpr,
    COMPILED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute all gradients; one program per sequence and BD channels. That of a log_decay [D] is one per sequence."""
    C: tl.constexpr = R * G
    P: tl.constexpr = 3 if NORM else 2
    WIDTH: tl.constexpr = 2 * D if IMAGINARY else D
    blocks: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    column = (program % blocks) * BD
    n = program // blocks
    slot, start, length = first_slot(n, cu_seqlens, T, C, PACKED)
    head = n.to(tl.int64) * P
    mu_re = tl.zeros([1, 1, BD], tl.float32)
    mu_im = tl.zeros([1, 1, BD], tl.float32)
    mu_mass = tl.zeros([1, 1, BD], tl.float32)
    dchannel = tl.zeros([1, 1, BD], tl.float32)
    if dfinal is not None:
        mu_re += load_channels(dfinal, head, column, D, BD)
        mu_im += load_channels(dfinal, head + 1, column, D, BD)
        if NORM:
            mu_mass += load_channels(dfinal, head + 2, column, D, BD)
    channel_decay = None
    if PER_CHANNEL:
        channel_decay = load_channels(log_decay, 0, column, D, BD)
    tiles = tl.cdiv(length, C)
    for back in tl.range(0, tiles, num_stages=STAGES):
        tile = tiles - 1 - back
        row = start + tile * C
        left = length - tile * C
        at = (slot + tile) * (P + 1)
        x_RGD, mass_RGD, u_RGD = load_written(x, mass, row, left, column, D, R, G, BD)
        phase = load_channels(states, at + P, column, D, BD).to(tl.int32, bitcast=True)
        phase_RGD = cumulative_phase(to_turns(load_tile(omega, row, left, column, D, D, R, G, BD)), phase, R)
        g_re_RGD = load_tile(dy, row, left, column, WIDTH, D, R, G, BD).to(tl.float32)
        g_im_RGD = tl.zeros_like(g_re_RGD)
        if IMAGINARY:
            g_im_RGD = load_tile(dy + D, row, left, column, WIDTH, D, R, G, BD).to(tl.float32)
        gate_RGD = None
        passed = None
        later_RGD = None
        passed_later = None
        if log_decay is not None:
            gate_RGD, passed = tile_gates(log_decay, channel_decay, row, left, column, 0, D, R, G, BD)
            later_RGD, passed_later = tile_gates(log_decay, channel_decay, row, left, column, 1, D, R, G, BD)
        # fmt: off
        cos_RGD, sin_RGD = cos_sin(phase_RGD, COMPILED)
        write_re_RGD, write_im_RGD = load_direction(
            write_offset, phase_RGD, cos_RGD, sin_RGD, row, left, column, D, R, G, BD, COMPILED
        )
        read_re_RGD, read_im_RGD = load_direction(
            read_offset, phase_RGD, cos_RGD, sin_RGD, row, left, column, D, R, G, BD, COMPILED
        )
        u_re_RGD, u_im_RGD = u_RGD * write_re_RGD, u_RGD * write_im_RGD
        s_re, s_im = load_channels(states, at, column, D, BD), load_channels(states, at + 1, column, D, BD)
        p_re_RGD, p_im_RGD, _, _ = complex_scan(
            gate_RGD, passed, u_re_RGD, u_im_RGD, s_re, s_im, True, False, R, G
        )
        h_re_RGD, h_im_RGD = p_re_RGD + u_re_RGD, p_im_RGD + u_im_RGD
        z_re_RGD = read_re_RGD * h_re_RGD + read_im_RGD * h_im_RGD
        z_im_RGD = read_re_RGD * h_im_RGD - read_im_RGD * h_re_RGD
        if NORM:
            s_mass = load_channels(states, at + 2, column, D, BD)
            p_mass_RGD, _ = scan(gate_RGD, passed, mass_RGD, s_mass, True, False, R, G)
            factor_RGD = 1.0 / (p_mass_RGD + mass_RGD + EPSILON)
            g_re_RGD *= factor_RGD
            g_im_RGD *= factor_RGD
            dsum_RGD = -(g_re_RGD * z_re_RGD + g_im_RGD * z_im_RGD) * factor_RGD
            dsum_RGD, mu_mass = scan(later_RGD, passed_later, dsum_RGD, mu_mass, False, True, R, G)
        if read_offset is not None:
            dread_RGD = g_re_RGD * z_im_RGD - g_im_RGD * z_re_RGD
            store_tile(dread_offset, dread_RGD, row, left, column, D, D, R, G, BD)
        if dfinal is not None:  # that of the last state, which is in the frame of the last position
            cos_D, sin_D = cos_sin(row_of(phase_RGD, R - 1, G - 1, R, G).to(tl.int64).to(tl.int32), COMPILED)
            last_re, last_im = cos_D * mu_re - sin_D * mu_im, sin_D * mu_re + cos_D * mu_im
            mu_re, mu_im = tl.where(back == 0, last_re, mu_re), tl.where(back == 0, last_im, mu_im)
        g_re_RGD, g_im_RGD = (
            g_re_RGD * read_re_RGD - g_im_RGD * read_im_RGD, g_re_RGD * read_im_RGD + g_im_RGD * read_re_RGD
        )
        mu_re_RGD, mu_im_RGD, mu_re, mu_im = complex_scan(
            later_RGD, passed_later, g_re_RGD, g_im_RGD, mu_re, mu_im, False, True, R, G
        )
        # fmt: on
        domega_RGD = mu_re_RGD * p_im_RGD - mu_im_RGD * p_re_RGD
        store_tile(domega, domega_RGD, row, left, column, D, D, R, G, BD)
        du_RGD = mu_re_RGD * write_re_RGD + mu_im_RGD * write_im_RGD
        if mass is None:
            store_tile(dx, du_RGD, row, left, column, D, D, R, G, BD)
        else:
            store_tile(dx, du_RGD * mass_RGD, row, left, column, D, D, R, G, BD)
            dmass_RGD = du_RGD * x_RGD
            if NORM:
                dmass_RGD += dsum_RGD
            store_tile(dmass, dmass_RGD, row, left, column, D, D, R, G, BD)
        if write_offset is not None:
            dwrite_RGD = mu_im_RGD * u_re_RGD - mu_re_RGD * u_im_RGD
            store_tile(dwrite_offset, dwrite_RGD, row, left, column, D, D, R, G, BD)
        if log_decay is not None:
            dgate_RGD = mu_re_RGD * p_re_RGD + mu_im_RGD * p_im_RGD
            if NORM:
                dgate_RGD += dsum_RGD * p_mass_RGD
            if PER_CHANNEL:
                dgate_RGD = tl.where(rows_of_tile(R, G) < left, dgate_RGD, 0.0)
                dchannel += tl.sum(tl.sum(dgate_RGD, 0, keep_dims=True), 1, keep_dims=True)
            else:
                store_tile(dlog_decay, dgate_RGD, row, left, column, D, D, R, G, BD)
    if PER_CHANNEL:
        store_channels(dlog_decay, dchannel, n.to(tl.int64), column, D, BD)
    if initial is not None:
        if log_decay is not None:
            gate_RGD, _ = tile_gates(log_decay, channel_decay, start, length, column, 0, D, 1, 1, BD)
            mu_re *= gate_RGD
            mu_im *= gate_RGD
            mu_mass *= gate_RGD
        store_channels(dinitial, mu_re, head, column, D, BD)
        store_channels(dinitial, mu_im, head + 1, column, D, BD)
        if NORM:
            store_channels(dinitial, mu_mass, head + 2, column, D, BD)
