"""The two memories of the phase mixer: a complex number per channel, or an outer product of frequencies and values.

Shapes: B batch, T positions, D width, H heads, K frequencies of a head, F phases, V value width, G groups of channels
with one decay and one mass.
"""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from kernels.phase_scan import phase_scan, step_phase_scan, zero_state
from lightning_modules.phase.outer import outer_scan, outer_window


@dataclass
class Written:
    """What a memory takes at T positions; None stands for offsets of 0, a mass of 1 and no decay.

    Attributes:
        value_BTD: v.
        omega_BTF: Steps of the phase, in radians.
        read_BTF: Offset of the reader.
        write_BTF: Offset of the writer.
        mass_BTG: m.
        log_decay: log gamma, [G] or [B, T, G].
    """

    value_BTD: Tensor
    omega_BTF: Tensor
    read_BTF: Tensor | None
    write_BTF: Tensor | None
    mass_BTG: Tensor | None
    log_decay: Tensor | None


class ChannelMemory(nn.Module):
    """y_t = sum_s gamma_{s+1..t} m_s v_s cos(phi_t + r_t - phi_s - w_s) in each of D channels, over a window.

    Args:
        width: D; G = F = D.
        window: W; None for all positions.
        normalise: Divide by the sum of gamma_{s+1..t} m_s.
    """

    def __init__(self, width: int, window: int | None, normalise: bool):
        super().__init__()
        self.width, self.window, self.normalise = width, window, normalise

    def init_state(self, batch: int, like: Tensor) -> Tensor:
        """Return an empty memory of the type of `like`."""
        return zero_state(batch, self.width, self.window, self.normalise, like.dtype, like.device)

    def forward(self, x_BTD: Tensor, written: Written, state: Tensor) -> tuple[Tensor, Tensor]:
        """Return y_BTD and the memory after T positions; x_BTD is not used."""
        w = written
        inputs: dict[str, Any] = {"mass": w.mass_BTG, "read_offset": w.read_BTF, "write_offset": w.write_BTF}
        if w.value_BTD.shape[1] == 1:
            step: dict[str, Any] = {name: None if x is None else x[:, 0] for name, x in inputs.items()}
            step["log_decay"] = w.log_decay[:, 0] if w.log_decay is not None and w.log_decay.dim() == 3 else w.log_decay
            v_BD, omega_BD = w.value_BTD[:, 0], w.omega_BTF[:, 0]
            y_BD, state = step_phase_scan(v_BD, omega_BD, state, normalise=self.normalise, **step)
            return y_BD[:, None], state
        inputs |= {"log_decay": w.log_decay, "initial_state": state, "output_final_state": True}
        inputs |= {"window": self.window, "normalise": self.normalise}
        y_BTD, after = phase_scan(w.value_BTD, w.omega_BTF, **inputs)
        return y_BTD, cast(Tensor, after)


class OuterMemory(nn.Module):
    """y_t = sum_s gamma_{s+1..t} m_s v_s sum_k q_tk k_sk cos(phi_tk + r_tk - phi_sk - w_sk) / sqrt(K) in each head.

    q and k are linear maps of x; they begin equal, so that equal inputs find each other.

    Args:
        width: D; V = D / H.
        heads: H; G = H, and F = H K.
        frequencies: K.
        window: W; None for all positions.
    """

    def __init__(self, width: int, heads: int, frequencies: int, window: int | None):
        super().__init__()
        self.heads, self.frequencies, self.value_width, self.window = heads, frequencies, width // heads, window
        self.q_proj, self.k_proj = (nn.Linear(width, heads * frequencies, bias=False) for _ in range(2))
        self.k_proj.load_state_dict(self.q_proj.state_dict())

    def init_state(self, batch: int, like: Tensor) -> Any:
        """Return an empty memory of the type of `like`."""
        sizes = 2 * self.frequencies, self.value_width
        if self.window is None:
            return like.new_zeros(batch, self.heads, *sizes)
        keys, values = (like.new_zeros(batch, self.heads, self.window - 1, size) for size in sizes)
        return keys, values

    def forward(self, x_BTD: Tensor, written: Written, state: Any) -> tuple[Tensor, Any]:
        """Return y_BTD and the memory after T positions."""
        omega_BTF = written.omega_BTF
        none_BTF, none_BTH = torch.zeros_like(omega_BTF), omega_BTF.new_zeros(*omega_BTF.shape[:2], self.heads)
        phases = (omega_BTF, *(none_BTF if x is None else x for x in (written.read_BTF, written.write_BTF)))
        rows = self.q_proj(x_BTD) * self.frequencies**-0.5, self.k_proj(x_BTD), written.value_BTD, *phases
        q_BTHK, k_BTHK, *others = (row.to(omega_BTF.dtype).unflatten(2, (self.heads, -1)) for row in rows)
        if written.mass_BTG is not None:
            k_BTHK = k_BTHK * written.mass_BTG[..., None]
        log_decay_BTH = none_BTH if written.log_decay is None else none_BTH + written.log_decay
        scan: Any = outer_scan if self.window is None else outer_window
        y_BTHV, state = scan(q_BTHK, k_BTHK, *others, log_decay_BTH, state)
        return y_BTHV.flatten(2), state
