"""Random inputs of the phase scan."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

NAMES = "x", "omega", "mass", "log_decay", "read_offset", "write_offset", "initial_state"


@dataclass(frozen=True)
class Toy:
    B: int = 2
    T: int = 40
    D: int = 3
    decay: Literal["channel", "input"] | None = "input"
    strength: float = 0.5
    window: int | None = None
    rate: float = torch.pi
    extras: bool = True  # mass, both offsets, normalisation, imaginary parts and an initial state
    normalised: bool = True  # as far as there are extras
    bounds: tuple[int, ...] | None = None
    dtype: torch.dtype = torch.float64

    @property
    def options(self) -> dict:
        bounds = {} if self.bounds is None else {"cu_seqlens": torch.tensor(self.bounds)}
        normalise = self.extras and self.normalised
        return bounds | {"window": self.window, "normalise": normalise, "imaginary": self.extras}

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """Return the tensors by name; those that the toy lacks are not in it. omega is between -rate and rate."""
        draw = torch.Generator().manual_seed(seed)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32

        def uniform(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=draw, dtype=wide)

        rows = self.B, self.T, self.D
        inputs = {"x": torch.randn(*rows, generator=draw, dtype=wide), "omega": (2 * uniform(*rows) - 1) * self.rate}
        if self.decay:
            inputs["log_decay"] = -self.strength * (0.5 + uniform(*rows[0 if self.decay == "input" else 2 :]))
        if self.extras:
            inputs |= {"mass": 0.1 + uniform(*rows)}
            inputs |= {name: 6 * uniform(*rows) - 3 for name in ("read_offset", "write_offset")}
        inputs = {name: v.to(self.dtype) for name, v in inputs.items()}
        if self.extras:
            terms = () if self.window is None else (self.window - 1,)
            N = self.B if self.bounds is None else len(self.bounds) - 1
            inputs["initial_state"] = 0.5 + uniform(N, *terms, 2 + self.normalised, self.D)
        return inputs
