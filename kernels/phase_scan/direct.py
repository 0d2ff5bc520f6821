"""The definition of the phase scan as a sum over all pairs of positions; the tests compare the other forms with it."""

import torch
from torch import Tensor

from kernels.phase_scan.options import EPSILON


def direct_phase_scan(
    x: Tensor,
    omega: Tensor,
    mass: Tensor | None = None,
    log_decay: Tensor | None = None,
    window: int | None = None,
    read_offset: Tensor | None = None,
    write_offset: Tensor | None = None,
    normalise: bool = False,
    imaginary: bool = False,
) -> Tensor:
    """Compute the definition as a sum over all pairs of positions; see `kernels.phase_scan` for the arguments.

    It needs B T^2 D numbers, and fp64 where phases are large or decays strong.
    """
    rows = x.shape[1]
    mass = torch.ones_like(x) if mass is None else mass
    gates = torch.zeros_like(x) if log_decay is None else log_decay.expand_as(x)
    read = write = omega.cumsum(1)
    read = read if read_offset is None else read + read_offset
    write = write if write_offset is None else write + write_offset
    distance = torch.arange(rows, device=x.device)[:, None] - torch.arange(rows, device=x.device)
    inside = (distance >= 0) & (distance < (rows if window is None else window))
    decay = gates.cumsum(1)
    log_weight_BTTD = (decay[:, :, None] - decay[:, None]).masked_fill(~inside[:, :, None], -torch.inf)
    weight_BTTD = log_weight_BTTD.exp() * mass[:, None]
    angle_BTTD = write[:, None] - read[:, :, None]
    y = (weight_BTTD * angle_BTTD.cos() * x[:, None]).sum(2)
    if imaginary:
        y = torch.cat((y, (weight_BTTD * angle_BTTD.sin() * x[:, None]).sum(2)), -1)
    return y / (weight_BTTD.sum(2) + EPSILON).repeat(1, 1, 1 + imaginary) if normalise else y
