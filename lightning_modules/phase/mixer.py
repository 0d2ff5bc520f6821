"""The mixer `phase`: a memory that is written and read by phase (the notes' TPI).

Shapes: B batch, T positions, D width, H heads, K frequencies of a head, F phases, P positions of the past of the
convolution.
"""

from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from lightning_modules.mixers.convolution import ShortConvolution
from lightning_modules.phase.angles import Angles, Kind
from lightning_modules.phase.memory import ChannelMemory, OuterMemory, Written
from lightning_modules.phase.weights import Decay, DecayKind, Mass

Normalise = Literal["rms", "mass", "none"]


@dataclass
class PhaseState:
    """What the mixer carries from one position to the next; its size does not grow.

    Attributes:
        past_BPD: Last inputs of the convolution.
        sum_BF: Sum of the reader's steps; None for angles without one.
        memory: The memory.
    """

    past_BPD: Tensor
    sum_BF: Tensor | None
    memory: Any


class PhaseMixer(nn.Module):
    """y_t = sum_{s<=t} gamma^{t-s} m_s v_s cos(phi_t + r_t - phi_s - w_s), phi = cumsum(omega), in each channel.

    Values v, steps omega and offsets r and w (`Angles`), the decay gamma (`Decay`) and the mass m (`Mass`) are maps of
    the input behind a short convolution. The output is out_proj(norm(y)), or out_proj(gelu(up_proj(norm(y)))).

    With `frequencies`, a head has K phases and strengths q and k to read and to write them, and its memory is an outer
    product: y_t = sum_{s<=t} gamma^{t-s} m_s v_s sum_k q_tk k_sk cos(phi_tk + r_tk - phi_sk - w_sk).

    Sites: `angles.advance` (omega), `decay.log_decay`, `mass.mass`, `value` (v) and `read` (y) [B, T, D].

    Source: document 002.

    Args:
        width: D.
        heads: H of the outer-product memory, a divisor of D.
        frequencies: K; None for a memory of one complex number in each of D channels.
        angles: How the phases of writer and reader differ; see `Angles`.
        decay: Whether gamma is 1, a learned number, or depends on the input.
        window: W, the positions that are read, the last one included; None for all.
        mass: Weight what is written with m = sigmoid(x); 1 without.
        normalise: `rms` divides y by its root mean square over a head, `mass` by the sum of gamma^{t-s} m_s (in
            channels only).
        conv_width: Positions that the short convolution reads; 0 for none.
        expansion: Width of the hidden layer with GELU in the output, over D; 0 for a single linear map.
        dropout: Share of the inputs of `out_proj` that are zeroed in training.
    """

    site = "phase"

    def __init__(
        self,
        width: int,
        heads: int = 4,
        frequencies: int | None = None,
        angles: Kind = "single",
        decay: DecayKind = "learned",
        window: int | None = None,
        mass: bool = False,
        normalise: Normalise = "rms",
        conv_width: int = 4,
        expansion: int = 0,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.window = window
        groups = heads if frequencies else width  # of channels with one decay and one mass
        self.conv = ShortConvolution(width, conv_width)
        self.angles = Angles(width, groups, frequencies or 1, angles)
        self.decay, self.mass = Decay(width, groups, decay), Mass(width, groups, mass)
        self.v_proj, self.value, self.read = nn.Linear(width, width, bias=False), nn.Identity(), nn.Identity()
        self.memory: ChannelMemory | OuterMemory = ChannelMemory(width, window, normalise == "mass")
        if frequencies:
            self.memory = OuterMemory(width, heads, frequencies, window)
        self.norm_groups = heads if frequencies else 1
        self.norm = nn.RMSNorm(width // self.norm_groups, eps=1e-6) if normalise == "rms" else None
        hidden = expansion * width
        up = [nn.Linear(width, hidden), nn.GELU()] if expansion else []
        self.up_proj, self.dropout = nn.Sequential(*up), nn.Dropout(dropout)
        self.out_proj = nn.Linear(hidden or width, width, bias=False)

    def init_state(self, batch: int) -> PhaseState:
        """Return the state before the first position: nothing but zeros."""
        past_BPD = self.conv.init_past(batch, self.v_proj.weight)
        return PhaseState(past_BPD, self.angles.init_state(batch), self.memory.init_state(batch, past_BPD))

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the contribution to the residual stream, [B, T, D]."""
        return self.extend(x_BTD, self.init_state(len(x_BTD)))[0]

    def step(self, x_BD: Tensor, state: PhaseState) -> tuple[Tensor, PhaseState]:
        """Return the contribution at the next position, [B, D], and the state after it."""
        output_B1D, state = self.extend(x_BD[:, None], state)
        return output_B1D[:, 0], state

    def extend(self, x_BTD: Tensor, state: PhaseState) -> tuple[Tensor, PhaseState]:
        """Return the contribution at the next T positions, [B, T, D], and the state after them."""
        x_BTD, past_BPD = self.conv(x_BTD, state.past_BPD)
        omega_BTF, read_BTF, write_BTF = self.angles(x_BTD, state.sum_BF)
        weights = self.mass(x_BTD), self.decay(x_BTD)
        written = Written(self.value(self.v_proj(x_BTD)), omega_BTF, read_BTF, write_BTF, *weights)
        y_BTD, memory = self.memory(x_BTD, written, state.memory)
        y_BTD = self.read(y_BTD).to(self.v_proj.weight.dtype)
        if self.norm is not None:
            y_BTD = self.norm(y_BTD.unflatten(2, (self.norm_groups, -1))).flatten(2)
        output_BTD = self.out_proj(self.dropout(self.up_proj(y_BTD)))
        sum_BF = None if state.sum_BF is None or read_BTF is None else read_BTF[:, -1]
        return output_BTD, PhaseState(past_BPD, sum_BF, memory)
