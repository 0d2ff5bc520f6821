"""Launches of the kernels, registered with PyTorch as two operators, so that a compiled model contains them.

Shapes: as in `reference.py`; those of A, c, r_q and r_k are in `prepare.py`.
"""

import torch
from torch import Tensor

from kernels.gated_delta.backward import sweep_both_ways
from kernels.gated_delta.forward import compute_outputs
from kernels.gated_delta.gradients import compute_gradients
from kernels.gated_delta.prepare import prepare_chunks
from kernels.gated_delta.problem import Problem, Tensors
from kernels.gated_delta.reference import EPSILON, FLOORS


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
    """Return o, the final state, A, c and the factors of the l2 norms of queries and keys."""
    problem = Problem(k, v, cu_seqlens, normalise, negative)
    how, heads = problem.how, problem.J
    buffers = o, final, A, c, r_q, r_k = problem.forward_buffers(v, output_final_state)
    problem.run(
        prepare_chunks,
        problem.slots * heads,
        how.prepare,
        *(q, k, g, beta, A, c, r_q, r_k, cu_seqlens),
        **{"N": problem.N, "PARTS": how.parts, "EPSILON": EPSILON, "FLOOR": FLOORS[torch.float32]},
    )
    programs, outputs = problem.fill(how.outputs, directions=1)
    problem.run(
        compute_outputs,
        programs,
        outputs,
        *(q, k, v, beta, A, c, r_q, r_k, initial, o, final, cu_seqlens),
        **{
            "PARTS": how.parts,
            "scale": scale,
            "INITIAL": initial is not None,
            "FINAL": output_final_state,
        },
    )
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
    return Problem(k, v, cu_seqlens, normalise, negative).forward_buffers(v, output_final_state)


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
    c: Tensor,
    r_q: Tensor,
    r_k: Tensor,
    scale: float,
    normalise: bool,
    negative: bool,
) -> Tensors:
    """Return the gradients of q, k, v, g, beta and of the initial state."""
    problem = Problem(k, v, cu_seqlens, normalise, negative)
    how, heads = problem.how, problem.J
    dq, dk, dv, dg, dbeta, dinitial = problem.backward_buffers(k, v, initial)
    kept = v.dtype if how.parts else torch.float32
    errors = torch.empty_like(v, dtype=kept)
    shape = problem.slots, heads, problem.K, problem.V
    states, dstates = (v.new_empty(shape, dtype=kept) for _ in range(2))
    programs, sweeps = problem.fill(how.sweeps, directions=2)
    problem.run(
        sweep_both_ways,
        programs,
        sweeps,
        *(q, k, v, do, beta, A, c, r_q, r_k, initial, dfinal, dv, states, errors, dstates, dinitial, cu_seqlens),
        **{
            "N": problem.N,
            "PARTS": how.parts,
            "scale": scale,
            "INITIAL": initial is not None,
            "FINAL": dfinal is not None,
        },
    )
    problem.run(
        compute_gradients,
        problem.slots * heads,
        how.gradients,
        *(q, k, beta, c, r_q, r_k, do, dv, states, errors, dstates, dq, dk, dg, dbeta, cu_seqlens),
        **{"N": problem.N, "scale": scale},
    )
    if heads > problem.H:
        dq, dk = (x.view(*k.shape[:3], -1, problem.K).sum(3).to(k.dtype) for x in (dq, dk))
    return dq, dk, dv, dg, dbeta, dinitial


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
    c: Tensor,
    r_q: Tensor,
    r_k: Tensor,
    scale: float,
    normalise: bool,
    negative: bool,
) -> Tensors:
    _, _, *others = Problem(k, v, cu_seqlens, normalise, negative).backward_buffers(k, v, initial)
    return torch.empty_like(q), torch.empty_like(k), *others


_SIX = "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
for _schema, _run, _shapes in (
    (
        "gated_delta_forward(Tensor q, Tensor k, Tensor v, Tensor g, Tensor beta, Tensor? initial, Tensor? cu_seqlens, "
        "float scale, bool normalise, bool negative, bool output_final_state)",
        run_forward,
        _forward_shapes,
    ),
    (
        "gated_delta_backward(Tensor do, Tensor? dfinal, Tensor q, Tensor k, Tensor v, Tensor beta, Tensor? initial, "
        "Tensor? cu_seqlens, Tensor A, Tensor c, Tensor r_q, Tensor r_k, float scale, bool normalise, bool negative)",
        run_backward,
        _backward_shapes,
    ),
):
    _name, _, _arguments = _schema.partition("(")
    torch.library.define(f"crosstalk::{_name}", f"({_arguments} -> {_SIX}")
    torch.library.impl(f"crosstalk::{_name}", "CompositeExplicitAutograd", _run)  # the CPU too, for the interpreter
    torch.library.register_fake(f"crosstalk::{_name}", _shapes)
