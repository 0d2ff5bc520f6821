"""Launches of the kernels, registered with PyTorch as two operators, so that a compiled model contains them.

Shapes: as in `reference.py`; those of A, P and the factors are in `prepare.py`.
"""

from functools import lru_cache

import torch
from torch import Tensor

from kernels.call import KEPT, Call, compile_together, on_device
from kernels.gated_delta.backward import sweep_both_ways
from kernels.gated_delta.forward import compute_outputs
from kernels.gated_delta.gradients import compute_gradients
from kernels.gated_delta.prepare import prepare_chunks
from kernels.gated_delta.problem import Problem, Sizes, Tensors, sizes_of
from kernels.gated_delta.reference import EPSILON, FLOORS

Kinds = tuple[tuple[torch.dtype, torch.device] | None, ...]
Plan = tuple[Problem, Call, Call]


@lru_cache(KEPT)
def plan_forward(sizes: Sizes, kinds: Kinds, scale: float, initial: bool, final: bool) -> Plan:
    """Return the problem and both launches of a forward; `kinds` are those of the inputs, on which a launch relies."""
    problem = Problem(*sizes)
    alone = {"scale": float(scale), "EPSILON": EPSILON, "FLOOR": FLOORS[torch.float32]}
    states = {"INITIAL": initial, "FINAL": final}
    return (
        problem,
        problem.call(prepare_chunks, problem.slots * problem.J, problem.how.prepare, alone),
        problem.call(compute_outputs, *problem.fill(problem.how.outputs, directions=1), states),
    )


@lru_cache(KEPT)
def plan_backward(sizes: Sizes, kinds: Kinds, scale: float, initial: bool, final: bool) -> Plan:
    """Return the problem and both launches of a backward; `final`: the final state has a cotangent."""
    problem = Problem(*sizes)
    states = {"INITIAL": initial, "FINAL": final}
    return (
        problem,
        problem.call(sweep_both_ways, *problem.fill(problem.how.sweeps, directions=2), states),
        problem.call(compute_gradients, problem.slots * problem.J, problem.how.gradients, {"scale": float(scale)}),
    )


@lru_cache(KEPT)
def compile_step(sizes: Sizes, kinds: Kinds, scale: float, initial: bool, final: bool) -> None:
    """Compile the kernels of a training step side by side; `kinds` are those of the inputs of the forward."""
    q, k, v, g, beta, state, cu_seqlens = (kind and kind[0] for kind in kinds)
    problem, prepare, outputs = plan_forward(sizes, kinds, scale, initial, final)
    _, sweeps, gradients = plan_backward.__wrapped__(sizes, kinds, scale, initial, False)
    fp32 = torch.float32
    kept = v if problem.how.parts else fp32
    dq = dk = k if problem.H == problem.J else fp32
    squares = kept, kept, fp32
    with on_device(problem.device):
        compile_together(
            [
                (prepare, (q, k, g, beta, *squares, cu_seqlens)),
                (outputs, (q, k, v, *squares, state, v, fp32, cu_seqlens)),
                (sweeps, (q, k, v, v, *squares, state, None, v, kept, kept, kept, fp32, cu_seqlens)),
                (gradients, (q, k, beta, fp32, v, v, kept, kept, kept, dq, dk, fp32, fp32, cu_seqlens)),
            ]
        )


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    normalise: bool,
    negative: bool,
    output_final_state: bool,
) -> Tensors:
    """Return o, the final state, A, P and the factors."""
    sizes = sizes_of(k, v, cu_seqlens, normalise, negative)
    kinds = _kinds(q, k, v, g, beta, initial, cu_seqlens)
    options = sizes, kinds, scale, initial is not None, output_final_state
    if k.requires_grad:
        compile_step(*options)
    problem, prepare, outputs = plan_forward(*options)
    buffers = o, final, A, P, factors = problem.forward_buffers(v, output_final_state)
    with on_device(problem.device):
        prepare(q, k, g, beta, A, P, factors, cu_seqlens)
        outputs(q, k, v, A, P, factors, initial, o, final, cu_seqlens)
    return buffers


def _forward_shapes(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: float,
    normalise: bool,
    negative: bool,
    output_final_state: bool,
) -> Tensors:
    return Problem(*sizes_of(k, v, cu_seqlens, normalise, negative)).forward_buffers(v, output_final_state)


def run_backward(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    A: Tensor,
    P: Tensor,
    factors: Tensor,
    scale: float,
    normalise: bool,
    negative: bool,
) -> Tensors:
    """Return the gradients of q, k, v, g, beta and of the initial state."""
    sizes = sizes_of(k, v, cu_seqlens, normalise, negative)
    kinds = _kinds(do, dfinal, q, k, v, beta, initial, cu_seqlens)
    problem, sweeps, gradients = plan_backward(sizes, kinds, scale, initial is not None, dfinal is not None)
    dq, dk, dv, dg, dbeta, dinitial = problem.backward_buffers(k, v, beta, initial)
    kept = v.dtype if problem.how.parts else torch.float32
    errors = torch.empty_like(v, dtype=kept)
    states, dstates = (v.new_empty((problem.slots, problem.J, problem.V, problem.K), dtype=kept) for _ in range(2))
    with on_device(problem.device):
        inputs = q, k, v, do, A, P, factors, initial, dfinal
        sweeps(*inputs, dv, states, errors, dstates, dinitial, cu_seqlens)
        gradients(q, k, beta, factors, do, dv, states, errors, dstates, dq, dk, dg, dbeta, cu_seqlens)
    if problem.J > problem.H:
        dq, dk = (x.view(*k.shape[:3], -1, problem.K).sum(3).to(k.dtype) for x in (dq, dk))
    return dq, dk, dv, dg, dbeta, dinitial


def _kinds(*inputs: Tensor | None) -> Kinds:
    """Return types and devices: a tensor on a CPU, which Triton refuses, has no launch to repeat."""
    return tuple([x if x is None else (x.dtype, x.device) for x in inputs])


def _backward_shapes(
    do: Tensor,
    dfinal: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor,
    initial: Tensor | None,
    cu_seqlens: Tensor | None,
    A: Tensor,
    P: Tensor,
    factors: Tensor,
    scale: float,
    normalise: bool,
    negative: bool,
) -> Tensors:
    _, _, *others = Problem(*sizes_of(k, v, cu_seqlens, normalise, negative)).backward_buffers(k, v, beta, initial)
    return torch.empty_like(q), torch.empty_like(k), *others


for _schema, _outputs, _run, _shapes in (
    (
        "gated_delta_forward(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial, Tensor? cu_seqlens, "
        "float scale, bool normalise, bool negative, bool output_final_state)",
        5,
        run_forward,
        _forward_shapes,
    ),
    (
        "gated_delta_backward(Tensor do, Tensor? dfinal, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? initial, "
        "Tensor? cu_seqlens, Tensor A, Tensor P, Tensor factors, float scale, bool normalise, bool negative)",
        6,
        run_backward,
        _backward_shapes,
    ),
):
    _name, _, _arguments = _schema.partition("(")
    torch.library.define(f"crosstalk::{_name}", f"({_arguments} -> ({', '.join(['Tensor'] * _outputs)})")
    torch.library.impl(f"crosstalk::{_name}", "CompositeExplicitAutograd", _run)  # the CPU too, for the interpreter
    torch.library.register_fake(f"crosstalk::{_name}", _shapes)
