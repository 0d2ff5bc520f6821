"""The weights of what the phase memory holds: how fast it fades, and how much is written.

Shapes: B batch, T positions, D width, G groups of channels with one weight.
"""

import math
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

DecayKind = Literal["none", "learned", "input"]
HORIZONS = 4.0, 256.0  # positions in which the memory first fades to 1/e


class Decay(nn.Module):
    """log gamma: 0, -exp(a) with a learned a, or -exp(a) softplus(decay_proj(x)) / log 2; in fp32.

    exp(-a) begins as a spread from 4 to 256 positions, evenly on a log scale, and decay_proj as zero.

    Site: `log_decay`, [G] if `learned`, [B, T, G] if it depends on the input.

    Args:
        width: D.
        groups: G.
        kind: `none`, `learned` or `input`.
    """

    spread_G: Tensor

    def __init__(self, width: int, groups: int, kind: DecayKind):
        super().__init__()
        self.kind, self.log_decay = kind, nn.Identity()
        if kind != "none":
            shortest, longest = (math.log(horizon) for horizon in HORIZONS)
            self.register_buffer("spread_G", -torch.linspace(longest, shortest, groups), persistent=False)
            self.rate = nn.Parameter(torch.zeros(groups))  # weight decay leads back to the spread
        if kind == "input":
            self.decay_proj = nn.Linear(width, groups)
            nn.init.zeros_(self.decay_proj.weight)
            nn.init.zeros_(self.decay_proj.bias)

    def forward(self, x_BTD: Tensor) -> Tensor | None:
        """Return log gamma, or None for a memory that does not fade."""
        if self.kind == "none":
            return None
        rate_G = (self.spread_G + self.rate).exp()
        if self.kind == "learned":
            return cast(Tensor, self.log_decay(-rate_G))
        rate_BTG = rate_G * softplus(self.decay_proj(x_BTD).to(rate_G.dtype)) / math.log(2)
        return cast(Tensor, self.log_decay(-rate_BTG))


class Mass(nn.Module):
    """m_BTG = sigmoid(mass_proj(x)), in fp32.

    Site: `mass` [B, T, G].

    Args:
        width: D.
        groups: G.
        weighted: Whether there is a mass; it is 1 without.
    """

    def __init__(self, width: int, groups: int, weighted: bool):
        super().__init__()
        self.mass_proj, self.mass = nn.Linear(width, groups) if weighted else None, nn.Identity()

    def forward(self, x_BTD: Tensor) -> Tensor | None:
        """Return m_BTG, or None for 1."""
        if self.mass_proj is None:
            return None
        return cast(Tensor, self.mass(self.mass_proj(x_BTD).to(self.mass_proj.weight.dtype).sigmoid()))
