"""Normalisation of source states by statistics taken before training.

Shapes: B batch, S source positions, C source width.
"""

import torch
from torch import Tensor, nn


class StatisticalNormalizer(nn.Module):
    """Whiten each feature by the source's own statistics, then colour it: (x - mean) / std · scale.

    The notes coloured to the target's embedding scale (about 0.003) *before* the cross-attention, which kills it; here
    `scale` is 1 unless that flaw is asked for.

    Args:
        width: C.
        scale: Root mean square that comes out.
    """

    def __init__(self, width: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.register_buffer("mean_C", torch.zeros(width))
        self.register_buffer("std_C", torch.ones(width))

    @torch.no_grad()
    def calibrate(self, sum_C: Tensor, square_sum_C: Tensor, count_C: Tensor) -> None:
        """Take mean and standard deviation from sums over the states of real positions."""
        mean_C = sum_C / count_C
        self.mean_C.copy_(mean_C)
        self.std_C.copy_((square_sum_C / count_C - mean_C.square()).clamp_min(1e-12).sqrt())

    def forward(self, states_BSC: Tensor) -> Tensor:
        """Return the normalised states."""
        return (states_BSC - self.mean_C) / self.std_C * self.scale
