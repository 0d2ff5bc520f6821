"""Other ways to compute the phase scan, for benchmarks/phase_scan.py: in PyTorch alone, and with scans of others."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kernels.phase_scan import phase_scan

Rule = Callable[..., Tensor]
VARIANTS = "plain", "mass", "channel", "input"


def inputs(variant: str, B: int, T: int, D: int, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
    """Return the tensors of a variant: values and phases, and masses, decays per channel or decays per position."""
    found = {"x": torch.randn(B, T, D, device=device), "omega": math.pi * (2 * torch.rand(B, T, D, device=device) - 1)}
    match variant:
        case "mass":
            found["mass"] = torch.rand(B, T, D, device=device)
        case "channel":
            found["log_decay"] = -torch.rand(D, device=device) / 10
        case "input":
            found["log_decay"] = -torch.rand(B, T, D, device=device) / 10
    return {name: v.to(dtype).requires_grad_() for name, v in found.items()}


def ours(**values: Tensor) -> Tensor:
    """Run the kernels, or the reference on a CPU."""
    return phase_scan(values["x"], values["omega"], values.get("mass"), values.get("log_decay"))[0]


def eager(x: Tensor, omega: Tensor, mass: Tensor | None = None) -> Tensor:
    """Compute it with cumulative sums, as the notes do; without decay only."""
    phase = omega.float().cumsum(1)
    turn = torch.polar(torch.ones_like(phase), phase)
    written = x.float() if mass is None else x.float() * mass.float()
    return ((written * turn).cumsum(1) * turn.conj()).real.to(x.dtype)


def gates_and_values(
    x: Tensor, omega: Tensor, mass: Tensor | None = None, log_decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return the complex gates of the recurrence, and what it adds, in fp32."""
    decay = torch.ones_like(omega, dtype=torch.float32) if log_decay is None else log_decay.float().exp()
    written = x.float() if mass is None else x.float() * mass.float()
    return torch.polar(decay.expand(omega.shape), -omega.float()), torch.complex(written, torch.zeros_like(written))


def associative_scan(**values: Tensor) -> Tensor:
    """Compute the recurrence with PyTorch's own associative scan, of real and imaginary parts."""
    scan: Any = importlib.import_module("torch._higher_order_ops.associative_scan").associative_scan
    gates, written = gates_and_values(**values)

    def combine(first: tuple[Tensor, ...], second: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        a, b, u, v = first
        c, d, w, z = second
        return a * c - b * d, a * d + b * c, c * u - d * v + w, c * v + d * u + z

    parts = tuple(part.contiguous() for part in (gates.real, gates.imag, written.real, written.imag))
    mode = "pointwise" if gates.is_cuda else "generic"
    result: Tensor = scan(combine, parts, dim=1, combine_mode=mode)[2]
    return result.to(values["x"].dtype)


def peers(variant: str) -> dict[str, Rule]:
    """Return the other implementations that can be imported and know the variant."""
    found: dict[str, Rule] = {}
    if variant in ("plain", "mass"):
        found |= {"eager": eager, "torch.compile": torch.compile(eager)}
    found["associative_scan"] = torch.compile(associative_scan)
    try:
        scan: Any = importlib.import_module("accelerated_scan.complex").scan
    except ImportError as error:
        print(f"without accelerated_scan: {error}")
        return found

    def accelerated(layout: bool) -> Rule:
        def rule(**values: Tensor) -> Tensor:
            gates, written = gates_and_values(**values)
            if layout:  # it has the positions last
                gates, written = (v.transpose(1, 2).contiguous() for v in (gates, written))
                result: Tensor = scan(gates, written).real.transpose(1, 2)
            else:
                result = scan(gates, written).real
            return result.to(values["x"].dtype).contiguous()

        return rule

    return found | {"accelerated_scan": accelerated(True), "the same, as it lies": accelerated(False)}
