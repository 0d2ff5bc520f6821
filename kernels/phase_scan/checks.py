"""What is wrong with the arguments of the phase scan, in one sentence."""

import os
from collections.abc import Mapping
from typing import get_args

import torch
from torch import Tensor

from kernels.gated_delta.checks import check_bounds, check_tensors
from kernels.phase_scan.options import Backend

TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_inputs(
    x: Tensor,
    omega: Tensor,
    mass: Tensor | None,
    log_decay: Tensor | None,
    window: int | None,
    read_offset: Tensor | None,
    write_offset: Tensor | None,
    normalise: bool,
    initial_state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Check shapes, types and sizes; see `phase_scan`.

    Raises:
        ValueError: One of them is wrong.
    """
    others = {"mass": mass, "log_decay": log_decay, "read_offset": read_offset, "write_offset": write_offset}
    check_tensors({"x": x, "omega": omega}, others | {"initial_state": initial_state})
    if x.dim() != 3 or x.shape[2] == 0:
        raise ValueError(f"x must be [B, T, D] with at least one channel, not {_shape(x)}")
    check_window(window)
    _check_rows(x, {"omega": omega, **others})
    N = x.shape[0] if cu_seqlens is None else check_bounds(cu_seqlens, *x.shape[:2])
    if initial_state is not None:
        terms = () if window is None else (window - 1,)
        _check_state("initial_state", initial_state, [N, *terms, 2 + normalise, x.shape[2]], x)


def check_step(
    x: Tensor,
    omega: Tensor,
    state: Tensor,
    mass: Tensor | None,
    log_decay: Tensor | None,
    read_offset: Tensor | None,
    write_offset: Tensor | None,
    normalise: bool,
) -> None:
    """Check shapes and types; see `step_phase_scan`.

    Raises:
        ValueError: One of them is wrong.
    """
    others = {"mass": mass, "log_decay": log_decay, "read_offset": read_offset, "write_offset": write_offset}
    check_tensors({"x": x, "omega": omega, "state": state}, others)
    if x.dim() != 2:
        raise ValueError(f"x must be [B, D], one position, not {_shape(x)}")
    _check_rows(x, {"omega": omega, **others})
    terms = state.shape[1:2] if state.dim() == 4 else ()
    _check_state("state", state, [x.shape[0], *terms, 2 + normalise, x.shape[1]], x)


def check_phases(omega: Tensor, initial_phase: Tensor | None, cu_seqlens: Tensor | None) -> None:
    """Check shapes and types; see `accumulate_phase`.

    Raises:
        ValueError: One of them is wrong.
    """
    check_tensors({"omega": omega}, {"initial_phase": initial_phase})
    if omega.dim() != 3 or omega.dtype not in TYPES:
        raise ValueError(f"omega must be floats [B, T, D], not {omega.dtype} {_shape(omega)}")
    N = omega.shape[0] if cu_seqlens is None else check_bounds(cu_seqlens, *omega.shape[:2])
    if initial_phase is not None and _shape(initial_phase) != [N, omega.shape[2]]:
        raise ValueError(f"initial_phase must be [{N}, {omega.shape[2]}], not {_shape(initial_phase)}")


def check_window(window: int | None) -> None:
    """Check that a window is a whole number from 1 on.

    Raises:
        ValueError: It is not.
    """
    if window is not None and (isinstance(window, bool) or not hasattr(window, "__index__") or window < 1):
        raise ValueError(f"window must be a whole number from 1 on, the position itself, not {window}")


def _check_rows(x: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Check the inputs that have one number per value of x, and the types of all."""
    for name, v in others.items():
        if v is None:
            continue
        if v.shape != x.shape and not (name == "log_decay" and v.shape == x.shape[-1:]):
            also = f", or [{x.shape[-1]}], one number per channel" if name == "log_decay" else ""
            raise ValueError(f"{name} must be {_shape(x)}, as x{also}, not {_shape(v)}")
        if v.dtype not in TYPES:
            raise ValueError(f"{name} must be a float tensor, not {v.dtype}")
    if x.dtype not in TYPES:
        raise ValueError(f"x must be fp32, bf16, fp16 or fp64, not {x.dtype}")


def _check_state(name: str, state: Tensor, shape: list[int], x: Tensor) -> None:
    if _shape(state) != shape:
        raise ValueError(f"{name} must be {shape}, the shape of zero_state, not {_shape(state)}")
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    if state.dtype != wanted:
        raise ValueError(f"{name} must be {wanted} beside {x.dtype} values, not {state.dtype}")


def check_backend(backend: Backend | None, x: Tensor, kernels: bool) -> Backend:
    """Return the backend that computes; Triton's interpreter, which TRITON_INTERPRET=1 starts, counts as a GPU.

    `kernels` says whether there are kernels for what is asked.

    Raises:
        ValueError: The backend is unknown, or Triton cannot treat these tensors.
    """
    if backend is None:
        return "triton" if x.is_cuda and x.dtype != torch.float64 and kernels else "reference"
    if backend not in get_args(Backend):
        raise ValueError(f"backend must be one of {', '.join(get_args(Backend))}, not {backend}")
    if backend == "triton" and not kernels:
        raise ValueError("backend triton has no window with decays or normalise: use backend reference for one")
    if backend == "triton" and x.dtype == torch.float64:
        raise ValueError("backend triton computes in fp32: use backend reference for fp64")
    if backend == "triton" and not x.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"backend triton needs tensors on a GPU, not on {x.device}")
    return backend


def _shape(x: Tensor) -> list[int]:
    return list(x.shape)
