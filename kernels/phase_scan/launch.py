"""Launches of the kernels, registered with PyTorch as two operators, so that a compiled model contains them.

Shapes: as in `forward.py`.
"""

from functools import lru_cache

import torch
from torch import Tensor

from kernels.call import KEPT, Call, on_device
from kernels.phase_scan.backward import compute_gradients
from kernels.phase_scan.forward import compute_outputs
from kernels.phase_scan.problem import Kinds, Problem, Tensors, kinds_of
from kernels.phase_scan.window_backward import compute_window_gradients
from kernels.phase_scan.window_forward import compute_window_outputs

Plan = tuple[Problem, Call]


@lru_cache(KEPT)
def plan_forward(inputs: Kinds, normalise: bool, imaginary: bool, final: bool, window: int | None) -> Plan:
    """Return the problem of a forward, and its launch."""
    problem = Problem(inputs, normalise, imaginary, window)
    kernel = compute_outputs if window is None else compute_window_outputs
    return problem, problem.call(kernel, problem.how.forward, FINAL=final)


@lru_cache(KEPT)
def plan_backward(cotangents: Kinds, inputs: Kinds, normalise: bool, imaginary: bool, window: int | None) -> Plan:
    """Return the problem of a backward, and its launch."""
    problem = Problem(inputs, normalise, imaginary, window)
    kernel = compute_gradients if window is None else compute_window_gradients
    return problem, problem.call(kernel, problem.how.backward)


def forget_plans() -> None:
    """Make each plan again at its next use, after a change of the table of configurations."""
    plan_forward.cache_clear()
    plan_backward.cache_clear()


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
    kinds = kinds_of(x, omega, mass, log_decay, read_offset, write_offset, initial, cu_seqlens)
    problem, launch = plan_forward(kinds, normalise, imaginary, output_final_state, window)
    y, final, states = problem.forward_buffers(x, output_final_state)
    with on_device(problem.device):
        if window is None:
            rows = x, omega, mass, log_decay, read_offset, write_offset
            launch(*rows, initial, y, final, states, cu_seqlens)
        else:
            launch(x, omega, mass, read_offset, write_offset, initial, y, states, cu_seqlens)
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
    kinds = kinds_of(x, omega, mass, log_decay, read_offset, write_offset, initial, cu_seqlens)
    problem = Problem(kinds, normalise, imaginary, window)
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
    inputs = x, omega, mass, log_decay, read_offset, write_offset, initial
    kinds = kinds_of(*inputs, cu_seqlens)
    problem, launch = plan_backward(kinds_of(dy, dfinal), kinds, normalise, imaginary, window)
    gradients = problem.backward_buffers(*inputs)
    with on_device(problem.device):
        if window is None:
            launch(*inputs, states, dy, dfinal, *gradients, cu_seqlens)
        else:
            dx, domega, dmass, _, dread, dwrite, dinitial = gradients  # there is no decay
            rows = x, omega, mass, read_offset, write_offset
            launch(*rows, initial, states, dy, dx, domega, dmass, dread, dwrite, dinitial, cu_seqlens)
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
    kinds = kinds_of(x, omega, mass, log_decay, read_offset, write_offset, initial, cu_seqlens)
    problem = Problem(kinds, normalise, imaginary, window)
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
