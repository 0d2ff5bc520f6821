"""The gates of the gated delta rule: how fast a head forgets, and how strongly it writes.

Shapes: B batch, T positions, D width, H heads.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import softplus

RATES = 1e-3, 1e-1  # range of the initial -g: a head forgets in 1000 to 10 positions

InitialGates = Literal["spread", "seed"]


class Gates(nn.Module):
    """Log-decay g = -exp(A_log) softplus(a(x) + dt_bias), and writing strength beta = m sigmoid(b(x)), in fp32.

    Sites: `log_decay` and `beta`, both [B, T, H].

    Args:
        width: D.
        heads: H.
        initial: `spread` begins with a -g between .001 and .1, spread evenly over the heads on a log scale, and a beta
            of m / 2. `seed` begins as the notes do, with a decay of .88 and a beta of .12 m.
        most_beta: m.
    """

    def __init__(self, width: int, heads: int, initial: InitialGates, most_beta: float):
        super().__init__()
        self.most_beta = most_beta
        self.a_proj, self.b_proj = nn.Linear(width, heads, bias=False), nn.Linear(width, heads)
        if initial == "seed":  # the notes' decay is sigmoid(2 - a) = exp(-softplus(a - 2))
            bias_H, b_bias = torch.full([heads], -2.0), -2.0
        else:
            # One draw in each of H equal parts of the range: of a few independent draws, all may forget at once
            shares_H = (torch.arange(heads) + torch.rand(heads)) / heads
            rates_H = RATES[0] * (RATES[1] / RATES[0]) ** shares_H
            bias_H, b_bias = rates_H.expm1().log(), 0.0
        self.A_log, self.dt_bias = nn.Parameter(torch.zeros(heads)), nn.Parameter(bias_H)
        nn.init.constant_(self.b_proj.bias, b_bias)
        self.log_decay, self.beta = nn.Identity(), nn.Identity()

    def forward(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """Return g_BTH and beta_BTH."""
        a_BTH, b_BTH = (project(x_BTD).to(self.A_log.dtype) for project in (self.a_proj, self.b_proj))
        log_decay_BTH = self.log_decay(-self.A_log.exp() * softplus(a_BTH + self.dt_bias))
        return log_decay_BTH, self.beta(self.most_beta * b_BTH.sigmoid())
