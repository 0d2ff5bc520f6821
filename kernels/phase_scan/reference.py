"""The phase scan in plain PyTorch: the definition as a sum over pairs of positions, and an equal form in chunks.

In the frame that turns with the phase, the memory of a channel is a recurrence with a complex gate. This is a step:

    S_t = exp(l_t - i omega_t) S_{t-1} + m_t x_t exp(i write_offset_t)
    y_t = Re(S_t exp(-i read_offset_t))

The sum of masses is the same recurrence with the gate exp(l_t). Over a sequence, products of rounded gates would drift
by 1e-3 in 16384 positions, where the phase is constant. So a scan is in the frame of the first position: with the
cumulative phase phi, summed in fp64 modulo 2 pi, values turn by phi_t as they are written, and back as they are read.
The gates that remain are the decays. For the gradient of omega, a gate also has the factor exp(-i (omega - c)), with a
constant c of the value of omega: the gradient is then that of the recurrence, without a sum over later positions in
which rounding errors are larger than it where decays are strong. With a window and without decay no gate is needed: the
memory is a sum over the window, in which nothing is subtracted, and the gradient of omega is that of phi, summed in
fp64; before the window, it is zero to rounding.

States are [N, 2, D]: Re S and Im S; with `normalise` [N, 3, D], the sum of masses last. With a window of W positions
they are [N, W - 1, 2 or 3, D]: what is left of each of the last W - 1 positions, so S is the sum over them.

Source: seed document 002.

Shapes: B batch, T positions, D channels, N sequences, W window, C positions of a chunk, M chunks.
"""

from math import isqrt

import torch
from torch import Tensor

from kernels.gated_delta.packing import Packing
from kernels.phase_scan.checks import check_phases, check_window
from kernels.phase_scan.options import EPSILON
from kernels.phase_scan.recurrence import last_state, windowed_scan

CHUNK = 32  # positions; the fastest of 8, 16, 32 and 64 on a CPU, up to 1024 positions


def zero_state(
    batch: int,
    channels: int,
    window: int | None = None,
    normalise: bool = False,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str | None = None,
) -> Tensor:
    """Return the state in which nothing is written.

    Args:
        batch: Sequences N.
        channels: Channels D.
        window: The window W of the scan.
        normalise: Whether the scan divides by the sum of masses.
        dtype: fp32, or fp64 beside fp64 values.
        device: Where the state is.

    Returns:
        [N, P, D] or, with a window, [N, W - 1, P, D]. P is 2, or 3 with `normalise`.

    Raises:
        ValueError: The window is no whole number from 1 on.
    """
    check_window(window)
    terms = () if window is None else (window - 1,)
    return torch.zeros(batch, *terms, 2 + normalise, channels, dtype=dtype, device=device)


def accumulate_phase(omega: Tensor, initial_phase: Tensor | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """Return the cumulative sum of phases over positions, modulo 2 pi.

    The sum is in fp64: in fp32 it would lose the digits of the phase as it grows.

    Args:
        omega: Phase per position in radians [B, T, D].
        initial_phase: The sum before the first position [N, D], for N sequences; 0 by default. The last position of a
            result continues it.
        cu_seqlens: Bounds of packed sequences, each of which has its own sum.

    Returns:
        Phases [B, T, D] between -pi and pi, in fp32, or in fp64 if omega is.

    Raises:
        ValueError: A shape or type is wrong.
    """
    check_phases(omega, initial_phase, cu_seqlens)
    packing, wide = Packing(cu_seqlens), torch.promote_types(omega.dtype, torch.float32)
    phase = packing.unpack(omega.double()).cumsum(1)
    if initial_phase is not None:
        phase = phase + initial_phase[:, None].double()
    turns = (phase.detach() / (2 * torch.pi)).round()
    return packing.pack((phase - 2 * torch.pi * turns).to(wide), omega.shape[1])


def phase_scan(
    x: Tensor,
    omega: Tensor,
    mass: Tensor | None = None,
    log_decay: Tensor | None = None,
    window: int | None = None,
    read_offset: Tensor | None = None,
    write_offset: Tensor | None = None,
    normalise: bool = False,
    imaginary: bool = False,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    chunk: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the same in chunks of `chunk` positions; see `kernels.phase_scan` for the other arguments.

    The number of PyTorch's operations is that of the positions of a chunk and of the chunks, so by default both grow
    with the root of the length.
    """
    packing, rows, output_type = Packing(cu_seqlens), x.shape[1], x.dtype
    if log_decay is not None and log_decay.dim() == 1:
        log_decay = log_decay.expand(x.shape)
    x_NTD, omega_NTD = (packing.unpack(_wide(v, x)) for v in (x, omega))
    mass_NTD, log_decay_NTD, write_offset, read_offset = (
        None if v is None else packing.unpack(_wide(v, x)) for v in (mass, log_decay, write_offset, read_offset)
    )
    plain = window is not None and log_decay is None  # a sum over a window, without gates
    phase_NTD = accumulate_phase(omega_NTD if plain else omega_NTD.detach())
    write_phase, read_phase = (phase_NTD if v is None else phase_NTD + v for v in (write_offset, read_offset))
    gate, decay, write_NTD, mass_NTD = _terms(
        x_NTD, omega_NTD - omega_NTD.detach(), mass_NTD, log_decay_NTD, write_phase
    )
    gate_NTD, decay_NTD = (None, None) if plain else (gate, decay)
    written, masses = (None, None) if initial_state is None else _parts(initial_state, normalise)
    chunk = max(CHUNK, isqrt(x_NTD.shape[1])) if chunk is None else chunk
    memory_NTD = windowed_scan(gate_NTD, write_NTD, log_decay_NTD, written, window, chunk)
    sums_NTD = windowed_scan(decay_NTD, mass_NTD, log_decay_NTD, masses, window, chunk) if normalise else None
    y = packing.pack(_read(memory_NTD, sums_NTD, read_phase, imaginary), rows).to(output_type)
    if not output_final_state:
        return y, None
    lengths = x.new_full((x.shape[0],), rows, dtype=torch.long) if packing.bounds is None else packing.bounds.diff()
    final = last_state(gate_NTD, write_NTD, written, memory_NTD, lengths, window)
    last_phase = torch.cat((phase_NTD.new_zeros(phase_NTD.shape[0], 1, phase_NTD.shape[2]), phase_NTD), 1)[:, -1]
    final = turn(final, -last_phase if window is None else -last_phase[:, None])
    sums = None if sums_NTD is None else last_state(decay_NTD, mass_NTD, masses, sums_NTD, lengths, window)
    return y, _state(final, sums)


def step_phase_scan(
    x: Tensor,
    omega: Tensor,
    state: Tensor,
    mass: Tensor | None = None,
    log_decay: Tensor | None = None,
    read_offset: Tensor | None = None,
    write_offset: Tensor | None = None,
    normalise: bool = False,
    imaginary: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute one position; see `kernels.phase_scan` for the arguments."""
    wide = [None if v is None else _wide(v, x) for v in (x, omega, mass, log_decay, write_offset)]
    gate, decay, write, mass = _terms(*wide)  # type: ignore[arg-type]
    written, masses = _parts(state.to(decay.dtype), normalise)
    windowed = state.dim() == 4

    def advance(before: Tensor, gate: Tensor, write: Tensor) -> tuple[Tensor, Tensor]:
        if not windowed:
            after = gate * before + write
            return after, after
        terms = torch.cat((gate[:, None] * before, write[:, None]), 1)
        return terms.sum(1), terms[:, 1:]

    memory, written = advance(written, gate, write)
    sums, masses = (None, None) if masses is None else advance(masses, decay, mass)
    y = _read(memory, sums, None if read_offset is None else _wide(read_offset, x), imaginary)
    return y.to(x.dtype), _state(written, masses)


def _wide(v: Tensor, x: Tensor) -> Tensor:
    """Return v in fp32, or in fp64 if the values x are."""
    return v.to(torch.promote_types(x.dtype, torch.float32))


def _terms(
    x: Tensor, omega: Tensor, mass: Tensor | None, log_decay: Tensor | None, write_offset: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the complex gates, their moduli, what is written and its mass."""
    decay = torch.ones_like(omega) if log_decay is None else log_decay.exp().expand_as(omega)
    write = x if mass is None else mass * x
    written = torch.complex(write, torch.zeros_like(write)) if write_offset is None else turn(write, write_offset)
    return turn(decay, -omega), decay, written, torch.ones_like(x) if mass is None else mass


def turn(x: Tensor, phase: Tensor) -> Tensor:
    """Return x exp(i phase) for real or complex x."""
    return x * torch.complex(phase.cos(), phase.sin())


def _parts(state: Tensor, normalise: bool) -> tuple[Tensor, Tensor | None]:
    """Return the complex memory and the sums of masses of a state."""
    real, imaginary, *masses = state.unbind(-2)
    return torch.complex(real, imaginary), masses[0] if normalise else None


def _state(memory: Tensor, masses: Tensor | None) -> Tensor:
    """Return the state of a complex memory and the sums of masses."""
    parts = [memory.real, memory.imag] if masses is None else [memory.real, memory.imag, masses]
    return torch.stack(parts, -2)


def _read(memory: Tensor, sums: Tensor | None, offset: Tensor | None, imaginary: bool) -> Tensor:
    """Return the outputs of complex memories and sums of masses."""
    read = memory if offset is None else turn(memory, -offset)
    parts = [read.real, read.imag] if imaginary else [read.real]
    return torch.cat(parts if sums is None else [part / (sums + EPSILON) for part in parts], -1)
