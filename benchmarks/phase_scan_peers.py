"""Other ways to compute the phase scan, for benchmarks/phase_scan.py: in PyTorch alone, and with scans of others."""

import importlib
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from benchmarks.phase_scan_associative import associative_scan
from kernels.phase_scan import phase_scan

Rule = Callable[..., Tensor]
VARIANTS = "plain", "mass", "channel", "input", "window"
WITHOUT_DECAY = "eager", "compile"
WITH_WINDOW = "ours", "reference", "eager", "compile"


def inputs(variant: str, B: int, T: int, D: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Return the tensors of a variant: values and phases, and masses, decays per channel or decays per position.

    A window has no tensor of its own.
    """
    found = {"x": torch.randn(B, T, D, device=device), "omega": math.pi * (2 * torch.rand(B, T, D, device=device) - 1)}
    match variant:
        case "mass":
            found["mass"] = torch.rand(B, T, D, device=device)
        case "channel":
            found["log_decay"] = -torch.rand(D, device=device) / 10
        case "input":
            found["log_decay"] = -torch.rand(B, T, D, device=device) / 10
    return {name: v.to(dtype).requires_grad_() for name, v in found.items()}


def ours(**arguments: Any) -> Tensor:
    """Run the kernels, also those of a window, or the reference on a CPU."""
    return phase_scan(**{"backend": "triton" if arguments["x"].is_cuda else None} | arguments)[0]


def last_sums(x: Tensor, window: int | None) -> Tensor:
    """Return the sums over a window, or over all positions, as cumulative sums and their differences."""
    sums = x.cumsum(1)
    return sums if window is None else sums - pad(sums, (0, 0, window, 0))[:, : x.shape[1]]


def eager(x: Tensor, omega: Tensor, mass: Tensor | None = None, window: int | None = None) -> Tensor:
    """Compute it with cumulative sums, as the notes do; without decay only."""
    phase = omega.float().cumsum(1)
    turn = torch.polar(torch.ones_like(phase), phase)
    written = x.float() if mass is None else x.float() * mass.float()
    return (last_sums(written * turn, window) * turn.conj()).real.to(x.dtype)


def in_parts(x: Tensor, omega: Tensor, mass: Tensor | None = None, window: int | None = None) -> Tensor:
    """Compute the same in real numbers, because `torch.compile` has no complex ones."""
    phase = omega.float().cumsum(1)
    cos, sin = phase.cos(), phase.sin()
    written = x.float() if mass is None else x.float() * mass.float()
    return (last_sums(written * cos, window) * cos + last_sums(written * sin, window) * sin).to(x.dtype)


def gates_and_values(
    x: Tensor, omega: Tensor, mass: Tensor | None = None, log_decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the complex gates of the recurrence, and what it adds, in fp32."""
    decay = torch.ones_like(omega, dtype=torch.float32) if log_decay is None else log_decay.float().exp()
    written = x.float() if mass is None else x.float() * mass.float()
    return torch.polar(decay.expand(omega.shape), -omega.float()), torch.complex(written, torch.zeros_like(written))


def accelerated_scan(layout: bool, **values: Tensor) -> Tensor:
    """Compute the recurrence with the package accelerated_scan, which has the positions last.

    Args:
        layout: Change the layout; without, it computes a scan over channels, and only its time counts.
        **values: The tensors.
    """
    scan: Any = importlib.import_module("accelerated_scan.complex").scan
    gates, written = gates_and_values(**values)
    if layout:
        gates, written = (v.transpose(1, 2).contiguous() for v in (gates, written))
    memory = scan(gates.contiguous(), written).real
    result: Tensor = memory.transpose(1, 2) if layout else memory
    return result.to(values["x"].dtype).contiguous()


RULES: dict[str, Rule] = {
    "ours": ours,
    "reference": partial(ours, backend="reference"),
    "eager": eager,
    "compile": torch.compile(in_parts, dynamic=False),
    "associative_scan": associative_scan,
    "accelerated_scan": partial(accelerated_scan, True),
    "accelerated_scan_as_it_lies": partial(accelerated_scan, False),
}
