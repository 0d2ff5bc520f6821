"""The phase scan of TPI: each channel is one complex memory that is written and read by phase.

With the cumulative phase phi_t = omega_1 + ... + omega_t, the decay D_ts = exp(l_{s+1} + ... + l_t) and the masses m:

    h_t = sum_{s <= t} D_ts m_s x_s exp(i (phi_s + write_offset_s - phi_t - read_offset_t))
    y_t = Re h_t, and Im h_t behind it if `imaginary` is set

The Triton kernels run on a GPU, the reference in plain PyTorch elsewhere. `reference.py` has the algorithm.
"""

from torch import Tensor

from kernels.phase_scan import reference
from kernels.phase_scan.checks import check_backend, check_inputs, check_step
from kernels.phase_scan.options import Backend
from kernels.phase_scan.reference import accumulate_phase, zero_state
from kernels.phase_scan.window_state import last_terms

__all__ = ["accumulate_phase", "phase_scan", "step_phase_scan", "zero_state"]


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
    backend: Backend | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute the phase scan over whole sequences, for training and for reading a prompt.

    The variants of seed document 002 are choices of the offsets, which are inside the cosine:

    - Single omega: no offsets.
    - Query offset: `read_offset` is a projection of the input at the reading position.
    - Decoupled key and query phases: `omega` is the rate of the keys, and `read_offset` is
      `accumulate_phase(omega_query - omega_key)`, since phi_query = phi_key plus that sum.
    - Constrained decoupling: `read_offset` is `accumulate_phase(0.1 * adjustment)`.

    Args:
        x: Values [B, T, D], fp32, bf16 or fp16, or fp64 for the reference.
        omega: Phase per position in radians [B, T, D]. The kernels return NaN for phases and offsets beyond 25 000.
        mass: Factors of the values [B, T, D], at least 0; 1 by default.
        log_decay: Log-decays, at most 0: [D], one per channel, or [B, T, D], which may depend on the input. No decay
            by default.
        window: Positions that the sum covers, the current one included; all by default.
        read_offset: Phase in radians that is added to phi where it reads [B, T, D].
        write_offset: Phase in radians that is added to phi where it writes [B, T, D].
        normalise: Divide by the decayed sum of the masses, sum_s D_ts m_s + 1e-6.
        imaginary: Return the imaginary parts too.
        initial_state: States before the first position, for N sequences, in fp32 (fp64 beside fp64 values); N is B, or
            the number of packed sequences. Nothing was written by default. The shape is that of `zero_state`.
        output_final_state: Return the states after the last positions too.
        cu_seqlens: Bounds [N + 1] of N sequences that lie one behind the other in a batch of one: 0, and where each
            ends. Empty sequences are allowed. Outputs after the last sequence are zero.
        backend: `triton` or `reference`; by default Triton where the tensors are on a GPU and not of fp64, and the
            reference for a window with a decay or with `normalise`, which the kernels do not have.

    Returns:
        The outputs [B, T, D] of the type of x, or [B, T, 2 D] with the imaginary parts behind the real ones; and the
        states after the last positions or None.

    Raises:
        ValueError: A shape, type or size is wrong; one sentence says which.
    """
    check_inputs(x, omega, mass, log_decay, window, read_offset, write_offset, normalise, initial_state, cu_seqlens)
    sums = x.shape[1] > 0 and log_decay is None and not normalise  # with a window, the kernels have only these
    if check_backend(backend, x, window is None or sums) == "reference":
        return reference.phase_scan(
            *(x, omega, mass, log_decay, window, read_offset, write_offset),
            *(normalise, imaginary, initial_state, output_final_state, cu_seqlens),
        )
    from kernels.phase_scan.function import scan  # Triton is not installed everywhere

    tensors = x, omega, mass, log_decay, read_offset, write_offset, initial_state
    contiguous = (None if v is None else v.contiguous() for v in tensors)
    if window is None:
        y, final, _ = scan(*contiguous, cu_seqlens, normalise, imaginary, output_final_state, None)
        return y, final if output_final_state else None
    y, _, _ = scan(*contiguous, cu_seqlens, normalise, imaginary, False, window)
    if not output_final_state:
        return y, None
    return y, last_terms(x, omega, mass, write_offset, initial_state, window, cu_seqlens)


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
    """Compute one position, for generation: the arguments of `phase_scan` at this position, without their axis T.

    Args:
        x: Values [B, D].
        omega: Phases [B, D].
        state: The state before the position, of the shape of `zero_state`; a window is part of this shape.
        mass: Factors of the values [B, D].
        log_decay: Log-decays [D] or [B, D].
        read_offset: Phases added where it reads [B, D].
        write_offset: Phases added where it writes [B, D].
        normalise: Divide by the decayed sum of the masses.
        imaginary: Return the imaginary parts too.

    Returns:
        The output [B, D] or [B, 2 D], and the state after the position.

    Raises:
        ValueError: A shape is wrong; one sentence says which.
    """
    check_step(x, omega, state, mass, log_decay, read_offset, write_offset, normalise)
    return reference.step_phase_scan(x, omega, state, mass, log_decay, read_offset, write_offset, normalise, imaginary)
