"""Launches of the kernels, registered with PyTorch as two operators, so that a compiled model contains them.

Shapes: as in `forward.py`.
"""

import torch
from torch import Tensor

from kernels.phase_scan.backward import compute_gradients
from kernels.phase_scan.forward import compute_outputs
from kernels.phase_scan.problem import Problem, Tensors
from kernels.phase_scan.window_backward import compute_window_gradients
from kernels.phase_scan.window_forward import compute_window_outputs


def run_forward(
    x: Tensor,
    omega: Tensor,
    mass: Tensor | None,
    log_decay: Tensor | None,
    read_offset: Tensor | None,
    write_offset: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    normalise: bool,
    imaginary: bool,
    output_final_state: bool,
    window: int | None,
) -> Tensors:
    """Return outputs, final states and the states before tiles; with a window, no final states."""
    problem = Problem(x, mass, log_decay, read_offset, write_offset, cu_seqlens, normalise, imaginary, window)
    y, final, states = problem.forward_buffers(x, output_final_state)
    if window is not None:
        rows = x, omega, mass, read_offset, write_offset
        problem.run(compute_window_outputs, problem.how.forward, *rows, initial, y, states, cu_seqlens)
        return y, final, states
    problem.run(
        compute_outputs,
        problem.how.forward,
        *(x, omega, mass, log_decay, read_offset, write_offset, initial, y, final, states, cu_seqlens),
        FINAL=output_final_state,
    )
    return y, final, states


def _forward_shapes(
    x: Tensor,
    omega: Tensor,
    mass: Tensor | None,
    log_decay: Tensor | None,
    read_offset: Tensor | None,
    write_offset: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    normalise: bool,
    imaginary: bool,
    output_final_state: bool,
    window: int | None,
) -> Tensors:
    problem = Problem(x, mass, log_decay, read_offset, write_offset, cu_seqlens, normalise, imaginary, window)
    return problem.forward_buffers(x, output_final_state)


def run_backward(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    omega: Tensor,
    mass: Tensor | None,
    log_decay: Tensor | None,
    read_offset: Tensor | None,
    write_offset: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    normalise: bool,
    imaginary: bool,
    window: int | None,
) -> Tensors:
    """Return the gradients of x, omega, mass, log-decay, read and write offset, and of the initial states."""
    problem = Problem(x, mass, log_decay, read_offset, write_offset, cu_seqlens, normalise, imaginary, window)
    inputs = x, omega, mass, log_decay, read_offset, write_offset, initial
    gradients = problem.backward_buffers(*inputs)
    if window is not None:
        rows = x, omega, mass, read_offset, write_offset
        found = [gradient for index, gradient in enumerate(gradients) if index != 3]  # there is no decay
        problem.run(compute_window_gradients, problem.how.backward, *rows, initial, states, dy, *found, cu_seqlens)
        return gradients
    problem.run(compute_gradients, problem.how.backward, *inputs, states, dy, dfinal, *gradients, cu_seqlens)
    return gradients


def _backward_shapes(
    dy: Tensor,
    dfinal: Tensor | None,
    x: Tensor,
    omega: Tensor,
    mass: Tensor | None,
    log_decay: Tensor | None,
    read_offset: Tensor | None,
    write_offset: Tensor | None,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    states: Tensor,
    normalise: bool,
    imaginary: bool,
    window: int | None,
) -> Tensors:
    problem = Problem(x, mass, log_decay, read_offset, write_offset, cu_seqlens, normalise, imaginary, window)
    return problem.backward_buffers(x, omega, mass, log_decay, read_offset, write_offset, initial)


_INPUTS = (
    "Tensor x, Tensor omega, Tensor? mass, Tensor? log_decay, Tensor? read_offset, Tensor? write_offset, "
    "Tensor? initial, Tensor? cu_seqlens"
)
_THREE, _SEVEN = (f"({', '.join(['Tensor'] * count)})" for count in (3, 7))
for _name, _arguments, _results, _run, _shapes in (
    (
        "phase_scan_forward",
        f"{_INPUTS}, bool normalise, bool imaginary, bool output_final_state, int? window",
        _THREE,
        run_forward,
        _forward_shapes,
    ),
    (
        "phase_scan_backward",
        f"Tensor dy, Tensor? dfinal, {_INPUTS}, Tensor states, bool normalise, bool imaginary, int? window",
        _SEVEN,
        run_backward,
        _backward_shapes,
    ),
):
    torch.library.define(f"crosstalk::{_name}", f"({_arguments}) -> {_results}")
    torch.library.impl(f"crosstalk::{_name}", "CompositeExplicitAutograd", _run)  # the CPU too, for the interpreter
    torch.library.register_fake(f"crosstalk::{_name}", _shapes)
