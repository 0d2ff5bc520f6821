# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, assignment"
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
from kernels.phase_scan.gates import gates, later_gates, log_product
from kernels.phase_scan.gradients import read_cotangents, store_gradients
from kernels.phase_scan.loads import directions, load_inputs, load_tile, written
from kernels.phase_scan.phases import cos_sin
from kernels.phase_scan.scans import scan, scan_two
from kernels.phase_scan.tiles import load_channels, store_channels


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
    EVEN: tl.constexpr,
    COMPILED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Compute all gradients; one program per sequence and BD channels. That of a log_decay [D] is one per sequence."""
    C: tl.constexpr = R * G
    P: tl.constexpr = 3 if NORM else 2
    blocks: tl.constexpr = (D + BD - 1) // BD
    program = tl.program_id(0)
    column = (program % blocks) * BD
    n = program // blocks
    slot, start, length = first_slot(n, cu_seqlens, T, C, PACKED)
    head = n.to(tl.int64) * P
    mu_re = tl.zeros([G, BD], tl.float32)
    mu_im = tl.zeros([G, BD], tl.float32)
    mu_mass = tl.zeros([G, BD], tl.float32)
    dchannel = tl.zeros([G, BD], tl.float32)
    if dfinal is not None:
        mu_re += load_channels(dfinal, head, column, D, G, BD)
        mu_im += load_channels(dfinal, head + 1, column, D, G, BD)
        if NORM:
            mu_mass += load_channels(dfinal, head + 2, column, D, G, BD)
    channel_decay = None
    if PER_CHANNEL:
        channel_decay = load_channels(log_decay, 0, column, D, G, BD)
    inputs = x, omega, mass, None if PER_CHANNEL else log_decay, read_offset, write_offset
    tiles = tl.cdiv(length, C)
    for back in tl.range(0, tiles, num_stages=STAGES):
        tile = tiles - 1 - back
        row = start + tile * C
        left = None if EVEN else length - tile * C
        at = (slot + tile) * (P + 1)
        phase = load_channels(states, at + P, column, D, G, BD).to(tl.int32, bitcast=True)
        x_RGD, omega_RGD, mass_RGD, log_RGD, read_RGD, write_RGD = load_inputs(inputs, row, left, column, D, R, G, BD)
        _, last_phase, _, write_re_RGD, write_im_RGD, read_re_RGD, read_im_RGD = directions(
            omega_RGD, read_RGD, write_RGD, phase, read_offset is not None, write_offset is not None, R, G, BD, COMPILED
        )
        x_RGD, mass_RGD, u_re_RGD, u_im_RGD = written(
            x_RGD, mass_RGD, None, write_re_RGD, write_im_RGD, left, mass is not None, R, G
        )
        gate_RGD = None
        passed = None
        later_RGD = None
        passed_later = None
        if log_decay is not None:
            gate_RGD, log_RGD = gates(log_RGD, channel_decay, left, R, G, COMPILED)
            rest = length - tile * C
            later_RGD, log_later_RGD = later_gates(
                gate_RGD, log_RGD, log_decay, channel_decay, row, rest, column, D, R, G, BD, COMPILED
            )
            passed = log_product(log_RGD, channel_decay, left, R, G)
            passed_later = log_product(log_later_RGD, channel_decay, rest - 1, R, G)
        s_re, s_im = load_channels(states, at, column, D, G, BD), load_channels(states, at + 1, column, D, G, BD)
        p_re_RGD, p_im_RGD, _, _ = scan_two(gate_RGD, passed, u_re_RGD, u_im_RGD, s_re, s_im, True, False, R, G)
        p_mass_RGD = None
        if NORM:
            s_mass = load_channels(states, at + 2, column, D, G, BD)
            p_mass_RGD, _ = scan(gate_RGD, passed, mass_RGD, s_mass, True, False, R, G)
        # fmt: off
        b_re_RGD, b_im_RGD, dsum_RGD = read_cotangents(
            dy, dread_offset, p_re_RGD, p_im_RGD, p_mass_RGD, u_re_RGD, u_im_RGD, mass_RGD, read_re_RGD, read_im_RGD,
            row, left, column, read_offset is not None, EPSILON, D, R, G, BD, NORM, IMAGINARY,
        )
        # fmt: on
        if dfinal is not None:  # the last state is in the frame of the last position
            cos_GD, sin_GD = cos_sin(last_phase, COMPILED)
            last_re, last_im = cos_GD * mu_re - sin_GD * mu_im, sin_GD * mu_re + cos_GD * mu_im
            mu_re, mu_im = tl.where(back == 0, last_re, mu_re), tl.where(back == 0, last_im, mu_im)
        mu_re_RGD, mu_im_RGD, mu_re, mu_im = scan_two(
            later_RGD, passed_later, b_re_RGD, b_im_RGD, mu_re, mu_im, False, True, R, G
        )
        mu_mass_RGD = None
        if NORM:
            mu_mass_RGD, mu_mass = scan(later_RGD, passed_later, dsum_RGD, mu_mass, False, True, R, G)
        # fmt: off
        dchannel = store_gradients(
            dx, domega, dmass, dlog_decay, dwrite_offset, dchannel, mu_re_RGD, mu_im_RGD, mu_mass_RGD, p_re_RGD,
            p_im_RGD, p_mass_RGD, u_re_RGD, u_im_RGD, x_RGD, mass_RGD, write_re_RGD, write_im_RGD, row, left, column,
            mass is not None, log_decay is not None, write_offset is not None, D, R, G, BD, NORM, PER_CHANNEL,
        )
        # fmt: on
    if PER_CHANNEL:
        store_channels(dlog_decay, tl.sum(dchannel, 0, keep_dims=True), n.to(tl.int64), column, D, G, BD)
    if initial is not None:
        if log_decay is not None:
            first_RGD = load_tile(inputs[3], start, length, column, D, D, 1, 1, BD)
            first_RGD, _ = gates(first_RGD, channel_decay, length, 1, 1, COMPILED)
            mu_re *= first_RGD[0]
            mu_im *= first_RGD[0]
            mu_mass *= first_RGD[0]
        store_channels(dinitial, mu_re, head, column, D, G, BD)
        store_channels(dinitial, mu_im, head + 1, column, D, G, BD)
        if NORM:
            store_channels(dinitial, mu_mass, head + 2, column, D, G, BD)
