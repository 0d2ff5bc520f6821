"""The gradient of the operators, and how an ensemble calls them."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.gated_delta.launch import run_forward
from kernels.gated_delta.problem import Tensors

Gradients = tuple[Tensor | None, ...]


def gated_delta(*inputs: Any) -> Tensors:
    """Run the kernels: as an operator in compiled code, directly elsewhere; `run_forward` has the arguments."""
    if torch.compiler.is_compiling():  # which loses the gradient of an `autograd.Function` under vmap
        result: Tensors = torch.ops.crosstalk.gated_delta_forward(*inputs)
        return result
    result = GatedDelta.apply(*inputs)  # type: ignore[no-untyped-call]
    return result


class GatedDelta(torch.autograd.Function):
    """The gated delta rule of the Triton kernels with its gradient, outside of compiled code.

    It calls the kernels without PyTorch's dispatcher, which would cost more time than they need for small inputs. The
    outputs behind the first two are what the gradient needs again.
    """

    @staticmethod
    def forward(*inputs: Any) -> Tensors:
        """Compute outputs and final state; `run_forward` has the arguments. To bind names takes PyTorch longer."""
        return run_forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        """Keep what the gradient needs."""
        q, k, v, g, beta, initial, cu_seqlens, *ctx.options, output_final_state = inputs
        _, final, *kept = output
        ctx.mark_non_differentiable(*kept if output_final_state else (final, *kept))
        ctx.set_materialize_grads(False)  # or each output without a gradient, such as A, gets one of zeros
        ctx.gate_types = g.dtype, beta.dtype
        ctx.save_for_backward(q, k, v, beta, initial, cu_seqlens, *kept)

    @staticmethod
    def backward(ctx: Any, do: Tensor | None, dfinal: Tensor | None, *_: Tensor | None) -> Gradients:
        """Compute the gradients of the first six inputs."""
        q, k, v, beta, initial, cu_seqlens, *kept = ctx.saved_tensors
        dq, dk, dv, dg, dbeta, dinitial = torch.ops.crosstalk.gated_delta_backward(
            torch.zeros_like(v) if do is None else do.contiguous(),
            None if dfinal is None else dfinal.contiguous(),
            *(q, k, v, beta, initial, cu_seqlens, *kept, *ctx.options),
        )
        dg, dbeta = dg.to(ctx.gate_types[0]), dbeta.to(ctx.gate_types[1])
        return dq, dk, dv, dg, dbeta, None if initial is None else dinitial, None, None, None, None, None

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[Tensors, tuple[int, ...]]:
        """Run the members of an ensemble at once."""
        return _run_members(GatedDelta.apply, info, in_dims, *inputs)


# PyTorch asks for it at each call, and Python would find it out each time
GatedDelta.forward.__signature__ = inspect.signature(GatedDelta.forward)  # type: ignore[attr-defined]


def _fold(x: Tensor, dim: int | None, members: int, axis: int) -> Tensor:
    """Return x with its axis of members merged into another axis, as the slower part."""
    x = x.unsqueeze(0).expand(members, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.movedim(0, axis).flatten(axis, axis + 1).contiguous()


def _unfold(x: Tensor, members: int, axis: int) -> Tensor:
    return x.view(*x.shape[:axis], members, -1, *x.shape[axis + 1 :]) if x.numel() else x.expand(members, *x.shape)


def _run_members(
    run: Callable[..., Tensors], info: Any, in_dims: Sequence[int | None], *inputs: Any
) -> tuple[Tensors, tuple[int, ...]]:
    """Run S members as S times as many rows, or as S times as many heads of packed rows."""
    S, packed = info.batch_size, inputs[6] is not None
    if in_dims[6] is not None:
        raise ValueError("cu_seqlens must be the same for all members of a vmap")
    axis, later = (2, 1) if packed else (0, 0)  # of the first five inputs and the output, of the states and the rest
    folded = [
        x if x is None or index > 5 else _fold(x, dim, S, later if index == 5 else axis)
        for index, (x, dim) in enumerate(zip(inputs, in_dims, strict=True))
    ]
    o, *others = run(*folded)
    axes = axis, *(later if x.numel() else 0 for x in others)
    return (_unfold(o, S, axis), *(_unfold(x, S, later) for x in others)), axes


torch.library.register_autograd(
    "crosstalk::gated_delta_forward", GatedDelta.backward, setup_context=GatedDelta.setup_context
)
torch.library.register_vmap(
    "crosstalk::gated_delta_forward",
    lambda info, in_dims, *inputs: _run_members(torch.ops.crosstalk.gated_delta_forward, info, in_dims, *inputs),
)
