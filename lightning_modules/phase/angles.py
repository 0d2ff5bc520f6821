"""The phases of the memory: how far each position turns it, and from which angle each position reads.

Shapes: B batch, T positions, D width, F phases of a position.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from kernels.phase_scan import accumulate_phase

Kind = Literal["single", "query_offset", "offsets", "constrained", "decoupled"]
PERIODS = 4.0, 512.0  # positions per turn of the initial frequencies
SPREAD = 0.5  # standard deviation of the initial omega(x) about its bias, as a share of the bias
COUPLING = 0.1  # share of the adjustment in `constrained`, as in the notes


class Angles(nn.Module):
    """Steps omega of the common phase phi = cumsum(omega), and the offsets of reader and writer.

    What is written at s is read at t with the weight cos(phi_t + r_t - phi_s - w_s). With linear maps omega, delta,
    kappa and omega' of x:

    - `single`: r = w = 0.
    - `query_offset`: r_t = delta(x_t), inside the cosine and never summed; w = 0.
    - `offsets`: r_t = delta(x_t) and w_s = kappa(x_s).
    - `constrained`: r = cumsum(0.1 delta(x)); w = 0. The reader's phase is the writer's with a small adjustment.
    - `decoupled`: r = cumsum(omega'(x) - omega(x)); w = 0. The reader's phase is a sum of its own.

    omega and omega' are learned about a spread of frequencies in each head, with periods of 4 to 512 positions, evenly
    on a log scale: weight decay leads back to them. omega(x) begins with a standard deviation of half its frequency,
    offsets with one of 1 rad. Phases are in fp32 also under autocast: a sum of bf16 phases is wrong by more than its
    size after 2000 positions.

    Sites: `advance` (omega) [B, T, F] in radians.

    Source: document 002, its first two attempts and its option B.

    Args:
        width: D.
        heads: Heads.
        frequencies: Phases of a head; F is the product of the two.
        kind: The kind.
    """

    frequency_F: Tensor

    def __init__(self, width: int, heads: int, frequencies: int, kind: Kind):
        super().__init__()
        self.kind, self.phases = kind, heads * frequencies
        frequency_F = spread_frequencies(heads, frequencies)
        self.register_buffer("frequency_F", frequency_F, persistent=False)
        self.omega, self.advance = _linear(width, SPREAD * frequency_F), nn.Identity()
        if kind == "decoupled":
            self.offset = _linear(width, SPREAD * frequency_F)
        elif kind != "single":
            self.offset = _linear(width, torch.ones(self.phases))
        if kind == "offsets":
            self.key_offset = _linear(width, torch.ones(self.phases))

    def init_state(self, batch: int) -> Tensor | None:
        """Return the sum of the reader's steps before the first position, [B, F]; None for kinds without a sum."""
        return self.omega.weight.new_zeros(batch, self.phases) if self.kind in ("constrained", "decoupled") else None

    def forward(self, x_BTD: Tensor, sum_BF: Tensor | None) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return omega_BTF, the reader's offset_BTF and the writer's offset_BTF; None stands for 0.

        Args:
            x_BTD: The input.
            sum_BF: The sum of the reader's steps so far; its next value is the last position of the reader's offset.
        """
        omega_BTF = self.advance(_project(x_BTD, self.omega) + self.frequency_F)
        if self.kind == "single":
            return omega_BTF, None, None
        offset_BTF = _project(x_BTD, self.offset)
        match self.kind:
            case "query_offset":
                return omega_BTF, offset_BTF, None
            case "offsets":
                return omega_BTF, offset_BTF, _project(x_BTD, self.key_offset)
            case "constrained":
                return omega_BTF, accumulate_phase(COUPLING * offset_BTF, sum_BF), None
            case "decoupled":
                return omega_BTF, accumulate_phase(offset_BTF + self.frequency_F - omega_BTF, sum_BF), None


def spread_frequencies(heads: int, frequencies: int) -> Tensor:
    """Return the frequencies that omega is learned about, in radians per position, [F]; a head has the whole range."""
    shortest, longest = (math.log(period) for period in PERIODS)
    omega_KH = 2 * math.pi * (-torch.linspace(shortest, longest, heads * frequencies)).exp().view(frequencies, heads)
    return omega_KH.T.flatten()


def _linear(width: int, deviation_F: Tensor) -> nn.Linear:
    """Return a linear map whose outputs begin with a mean of 0 and these standard deviations."""
    layer = nn.Linear(width, len(deviation_F))
    nn.init.zeros_(layer.bias)
    with torch.no_grad():
        layer.weight.normal_().mul_(width**-0.5 * deviation_F[:, None])
    return layer


def _project(x_BTD: Tensor, layer: nn.Linear) -> Tensor:
    with torch.autocast(x_BTD.device.type, enabled=False):
        return linear(x_BTD.to(layer.weight.dtype), layer.weight, layer.bias)
