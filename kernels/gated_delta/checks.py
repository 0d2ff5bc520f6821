"""What is wrong with the arguments of an operator, in one sentence."""

import os
from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from kernels.gated_delta.options import Backend

ALIGNMENT = 4  # of widths of keys and values
WIDEST = 256  # of keys and values: one tile of the state has to fit a multiprocessor
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_inputs(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None, cu_seqlens: Tensor | None
) -> None:
    """Check shapes, types and sizes; see `chunk_gated_delta_rule`.

    Raises:
        ValueError: One of them is wrong.
    """
    check_tensors({"q": q, "k": k, "v": v, "g": g, "beta": beta}, {"initial_state": initial_state})
    if q.dim() != 4 or q.shape != k.shape:
        raise ValueError(f"q and k must have the same shape [B, T, H, K], not {_shape(q)} and {_shape(k)}")
    B, T, H, K = k.shape
    if v.dim() != 4 or v.shape[:2] != (B, T) or v.shape[2] == 0 or H == 0 or v.shape[2] % H:
        raise ValueError(f"v must be [{B}, {T}, J, V] with J a multiple of the {H} heads of k, not {_shape(v)}")
    J, V = v.shape[2:]
    for name, x in (("g", g), ("beta", beta)):
        if x.shape != (B, T, J):
            raise ValueError(f"{name} must be [{B}, {T}, {J}], one number per position and value head, not {_shape(x)}")
    for name, width in (("K", K), ("V", V)):
        if width % ALIGNMENT or not 0 < width <= WIDEST:
            raise ValueError(f"{name} must be a multiple of {ALIGNMENT} from {ALIGNMENT} to {WIDEST}, not {width}")
    _check_types(q, k, v, g, beta)
    N = B if cu_seqlens is None else check_bounds(cu_seqlens, B, T)
    if initial_state is not None:
        if initial_state.shape != (N, J, K, V):
            raise ValueError(f"initial_state must be [{N}, {J}, {K}, {V}], not {_shape(initial_state)}")
        _check_state_type("initial_state", initial_state, v)


def check_step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> None:
    """Check shapes and types of one position; see `step_gated_delta_rule`.

    Raises:
        ValueError: One of them is wrong.
    """
    check_tensors({"q": q, "k": k, "v": v, "g": g, "beta": beta, "state": state}, {})
    if k.dim() != 3 or q.shape != k.shape:
        raise ValueError(f"q and k must have the same shape [B, H, K], not {_shape(q)} and {_shape(k)}")
    B, H, K = k.shape
    if v.dim() != 3 or v.shape[0] != B or v.shape[1] == 0 or H == 0 or v.shape[1] % H:
        raise ValueError(f"v must be [{B}, J, V] with J a multiple of the {H} heads of k, not {_shape(v)}")
    J, V = v.shape[1:]
    for name, x in (("g", g), ("beta", beta)):
        if x.shape != (B, J):
            raise ValueError(f"{name} must be [{B}, {J}], one number per value head, not {_shape(x)}")
    if state.shape != (B, J, K, V):
        raise ValueError(f"state must be [{B}, {J}, {K}, {V}], not {_shape(state)}")
    _check_types(q, k, v, g, beta)
    _check_state_type("state", state, v)


def check_tensors(needed: Mapping[str, Tensor], others: Mapping[str, Tensor | None]) -> None:
    """Check that the inputs are tensors on one device; `others` may be None.

    Raises:
        ValueError: One of them is not.
    """
    given = {**needed, **{name: x for name, x in others.items() if x is not None}}
    first = next(iter(given))
    for name, x in given.items():
        if not isinstance(x, Tensor):
            raise ValueError(f"{name} must be a tensor, not {x}")
        if x.device != given[first].device:
            raise ValueError(f"{name} must be on {given[first].device}, as {first}, not on {x.device}")


def check_bounds(cu_seqlens: Tensor, B: int, T: int) -> int:
    """Return the number of packed sequences; bounds on a GPU are not read, since the program would wait for them."""
    if not isinstance(cu_seqlens, Tensor):
        raise ValueError(f"cu_seqlens must be a tensor of integers [N + 1], not {cu_seqlens}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 2:
        raise ValueError(f"cu_seqlens must be integers [N + 1], not {cu_seqlens.dtype} {_shape(cu_seqlens)}")
    if B != 1:
        raise ValueError(f"cu_seqlens needs a batch of one, in which the sequences are packed, not {B}")
    if cu_seqlens.device.type == "cpu":
        bounds = cu_seqlens.tolist()
        if bounds[0] != 0 or bounds != sorted(bounds) or bounds[-1] > T:
            raise ValueError(f"cu_seqlens must rise from 0 to at most {T}, the length of the row, not {bounds}")
    return cu_seqlens.shape[0] - 1


def check_backend(backend: Backend | None, v: Tensor) -> Backend:
    """Return the backend that computes; Triton's interpreter, which TRITON_INTERPRET=1 starts, counts as a GPU.

    Raises:
        ValueError: The backend is unknown, or Triton cannot treat these tensors.
    """
    if backend is None:
        return "triton" if v.is_cuda and v.dtype != torch.float64 else "reference"
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, not {backend}")
    if backend == "triton" and v.dtype == torch.float64:
        raise ValueError("backend triton computes in fp32: use backend reference for fp64")
    if backend == "triton" and not v.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend triton needs tensors on a GPU, not on {v.device}")
    return backend


def _check_types(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> None:
    for name, x in (("g", g), ("beta", beta)):
        if x.dtype not in TYPES:
            raise ValueError(f"{name} must be a float tensor, not {x.dtype}")
    if v.dtype not in TYPES or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must all be fp32, bf16, fp16 or fp64, not {q.dtype}, {k.dtype} and {v.dtype}")


def _check_state_type(name: str, state: Tensor, v: Tensor) -> None:
    wanted = torch.float64 if v.dtype == torch.float64 else torch.float32
    if state.dtype != wanted:
        raise ValueError(f"{name} must be {wanted} beside {v.dtype} values, not {state.dtype}")


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
