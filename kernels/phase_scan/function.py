"""The gradient of the operators, and how an ensemble calls them."""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from kernels.phase_scan.launch import run_forward
from kernels.phase_scan.problem import Tensors

Gradients = tuple[Tensor | None, ...]


def scan(*inputs: Any) -> Tensors:
    """Run the kernels: as an operator in compiled code, directly elsewhere; `run_forward` has the arguments."""
    if torch.compiler.is_compiling():  # which loses the gradient of an `autograd.Function` under vmap
        result: Tensors = torch.ops.crosstalk.phase_scan_forward(*inputs)
        return result
    result = PhaseScan.apply(*inputs)  # type: ignore[no-untyped-call]
    return result


class PhaseScan(torch.autograd.Function):
    """The phase scan of the Triton kernels with its gradient, outside of compiled code.

    It calls the kernels without PyTorch's dispatcher, which would cost more time than they need for small inputs. The
    last output is what the gradient needs again.
    """

    @staticmethod
    def forward(*inputs: Any) -> Tensors:
        """Compute outputs and final states; `run_forward` has the arguments. To bind names takes PyTorch longer."""
        return run_forward(*inputs)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensors) -> None:
        """Keep what the gradient needs."""
        *tensors, ctx.normalise, ctx.imaginary, output_final_state, ctx.window = inputs
        _, final, states = output
        ctx.mark_non_differentiable(*(states,) if output_final_state else (final, states))
        ctx.set_materialize_grads(False)  # or each output without a gradient, such as the states, gets one of zeros
        ctx.save_for_backward(*tensors, states)

    @staticmethod
    def backward(ctx: Any, dy: Tensor | None, dfinal: Tensor | None, *_: Tensor | None) -> Gradients:
        """Compute the gradients of the first seven inputs."""
        saved = ctx.saved_tensors
        gradients = list(
            torch.ops.crosstalk.phase_scan_backward(
                _zeros(saved[0], ctx.imaginary) if dy is None else dy.contiguous(),
                None if dfinal is None else dfinal.contiguous(),
                *saved,
                *(ctx.normalise, ctx.imaginary, ctx.window),
            )
        )
        log_decay = saved[3]
        if log_decay is not None and log_decay.dim() == 1:
            gradients[3] = gradients[3].sum(0).to(log_decay.dtype)
        found = [None if x is None else gradient for x, gradient in zip(saved[:7], gradients, strict=True)]
        return (*found, None, None, None, None, None)

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *inputs: Any) -> tuple[Tensors, tuple[int, ...]]:
        """Run the members of an ensemble at once."""
        return _run_members(PhaseScan.apply, info, in_dims, *inputs)


# PyTorch asks for it at each call, and Python would find it out each time
PhaseScan.forward.__signature__ = inspect.signature(PhaseScan.forward)  # type: ignore[attr-defined]


def _zeros(x: Tensor, imaginary: bool) -> Tensor:
    return x.new_zeros(*x.shape[:2], x.shape[2] * (1 + imaginary))


def _fold(x: Tensor, dim: int | None, members: int, axis: int) -> Tensor:
    """Return x with its axis of members merged into another axis, as the slower part."""
    x = x.unsqueeze(0).expand(members, *x.shape) if dim is None else x.movedim(dim, 0)
    return x.movedim(0, axis).flatten(axis, axis + 1).contiguous()


def _unfold(x: Tensor, members: int, axis: int, parts: int = 1) -> Tensor:
    """Return x with its axis of members in front; `parts` such axes lie one behind the other."""
    if not x.numel():
        return x.expand(members, *x.shape)
    x = x.reshape(*x.shape[:axis], parts, members, -1, *x.shape[axis + 1 :]).movedim(axis + 1, 0)
    return x.flatten(axis + 1, axis + 2)


def _run_members(
    run: Callable[..., Tensors], info: Any, in_dims: Sequence[int | None], *inputs: Any
) -> tuple[Tensors, tuple[int, ...]]:
    """Run S members as S times as many rows; as S times as many channels if rows are packed or share their decay."""
    S, imaginary = info.batch_size, inputs[9]
    if in_dims[7] is not None:
        raise ValueError("cu_seqlens must be the same for all members of a vmap")
    log_decay = inputs[3]
    per_channel = log_decay is not None and log_decay.dim() - (in_dims[3] is not None) == 1
    axis = 2 if inputs[7] is not None or (per_channel and in_dims[3] is not None) else 0
    folded = list(inputs)
    for index in range(7):
        if inputs[index] is None or (index == 3 and per_channel):
            continue
        channels = inputs[index].dim() - (in_dims[index] is not None) - 1  # 3 in the states of a window
        folded[index] = _fold(inputs[index], in_dims[index], S, channels if axis else 0)
    if per_channel and axis == 2:
        folded[3] = _fold(log_decay, in_dims[3], S, 0)
    y, final, states = run(*folded)
    y = _unfold(y, S, axis, 1 + imaginary if axis else 1)
    return (y, _unfold(final, S, axis), _unfold(states, S, axis)), (0, 0, 0)


torch.library.register_autograd(
    "crosstalk::phase_scan_forward", PhaseScan.backward, setup_context=PhaseScan.setup_context
)
torch.library.register_vmap(
    "crosstalk::phase_scan_forward",
    lambda info, in_dims, *inputs: _run_members(torch.ops.crosstalk.phase_scan_forward, info, in_dims, *inputs),
)
