"""Random inputs of the gated delta rule."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import normalize


@dataclass(frozen=True)
class Toy:
    B: int = 2
    T: int = 40
    H: int = 1
    J: int = 2
    K: int = 8
    V: int = 4
    decay: float = 0.5
    beta: float | None = None
    bounds: tuple[int, ...] | None = None
    unit: bool = True
    dtype: torch.dtype = torch.float64

    @property
    def cu_seqlens(self) -> Tensor | None:
        return None if self.bounds is None else torch.tensor(self.bounds)

    def inputs(self, seed: int = 0) -> list[Tensor]:
        """Return q, k, v, g, beta and the initial state; beta is random in [0, 2] unless it is set."""
        draw = torch.Generator().manual_seed(seed)
        wide = torch.float64 if self.dtype == torch.float64 else torch.float32
        rows = self.B, self.T
        q, k = (torch.randn(*rows, self.H, self.K, generator=draw, dtype=wide) for _ in range(2))
        if self.unit:
            q, k = normalize(q, dim=-1), normalize(k, dim=-1)
        v = torch.randn(*rows, self.J, self.V, generator=draw, dtype=wide)
        g = -self.decay * (0.5 + torch.rand(*rows, self.J, generator=draw, dtype=wide))
        beta = 2 * torch.rand(*rows, self.J, generator=draw, dtype=wide)
        if self.beta is not None:
            beta.fill_(self.beta)
        sequences = self.B if self.bounds is None else len(self.bounds) - 1
        state = torch.randn(sequences, self.J, self.K, self.V, generator=draw, dtype=wide)
        return [q.to(self.dtype), k.to(self.dtype), v.to(self.dtype), g, beta, state]
