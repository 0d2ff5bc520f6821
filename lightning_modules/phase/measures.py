"""How far back a phase memory reaches, and how much of what it holds adds up.

Shapes: S ensemble members, B rows, T positions, G groups of channels with one decay and one mass, F phases.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from kernels.phase_scan import phase_scan
from lightning_modules.phase.mixer import PhaseMixer

SITES = "angles.advance", "decay.log_decay", "mass.mass"


def phase_mixers(network: nn.Module) -> dict[str, PhaseMixer]:
    """Return the phase mixers of a network by name."""
    return {name: module for name, module in network.named_modules() if isinstance(module, PhaseMixer)}


def memory_measures(seen: Mapping[str, Tensor], window: int | None) -> dict[str, Tensor]:
    """Return `effective_window` and `coherence` of a mixer, each [S].

    With weights a_ts = gamma_{s+1..t} over the positions in the window:

    - `effective_window`: sum_s a_ts at the last position, mean over rows and channels. It is 1 / (1 - gamma) for a
      constant decay in a long row, and the number of positions without a decay.
    - `coherence`: |sum_s a_ts m_s e^{i (phi_s - phi_t)}| / sum_s a_ts m_s, mean over the second half of the rows and
      the phases. It is 1 if all that the memory holds has one phase and adds up, and about 1 / sqrt(n) if n positions
      have random phases and cancel. Offsets of reader and writer are not part of it.

    Args:
        seen: Outputs of `SITES`, [S, B, T, F or G] (a learned decay [S, G]); a site without an output is absent.
        window: W; None for all positions.
    """
    omega_SBTF = seen["angles.advance"]
    shape = omega_SBTF.shape
    decay, mass = (_per_phase(seen.get(site), shape) for site in ("decay.log_decay", "mass.mass"))
    one_NTF = torch.ones_like(omega_SBTF).flatten(0, 1)
    reach_NTF, _ = phase_scan(one_NTF, torch.zeros_like(one_NTF), None, decay, window)
    sum_NTE, _ = phase_scan(one_NTF, omega_SBTF.flatten(0, 1), mass, decay, window, normalise=True, imaginary=True)
    length_NTF = torch.stack(sum_NTE.chunk(2, 2)).norm(dim=0)
    means = {"effective_window": reach_NTF[:, -1:], "coherence": length_NTF[:, shape[2] // 2 :]}
    return {name: x_NTF.unflatten(0, shape[:2]).mean((1, 2, 3)) for name, x_NTF in means.items()}


def _per_phase(x: Tensor | None, shape: torch.Size) -> Tensor | None:
    """Return weights of groups as weights of their phases, [S * B, T, F]."""
    if x is None:
        return None
    if x.dim() == 2:
        x = x[:, None, None].expand(*shape[:3], -1)
    return x.repeat_interleave(shape[3] // x.shape[3], 3).flatten(0, 1)
