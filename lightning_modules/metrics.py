"""Proportions with their uncertainty."""

import math

import torch
from torch import Tensor
from torchmetrics import Metric

Z95 = 1.959963984540054  # 97.5 % quantile of the normal distribution


def wilson_interval(hits: float, count: float) -> tuple[float, float]:
    """Return the Wilson score interval at 95 % of `hits` out of `count` (Wilson 1927).

    (p + z²/2n ± z sqrt(p(1-p)/n + z²/4n²)) / (1 + z²/n); (0, 1) where there is nothing to count.
    """
    if count == 0:
        return 0.0, 1.0
    p, z2 = hits / count, Z95**2
    middle, spread = p + z2 / (2 * count), Z95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2))
    low, high = (middle - spread) / (1 + z2 / count), (middle + spread) / (1 + z2 / count)
    return max(low, 0.0), min(high, 1.0)


class Proportion(Metric):
    """The share of hits among all that were seen, over all ranks."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, hits: Tensor | float, count: Tensor | int = 1) -> None:
        """Count `hits` among `count`."""
        self.hits += hits
        self.total += count

    def compute(self) -> Tensor:
        """Return hits over total."""
        return (self.hits / self.total).float()

    def interval(self) -> tuple[float, float]:
        """Return the Wilson interval of what `compute` returned, over all ranks."""
        with self.sync_context(should_sync=torch.distributed.is_initialized() if torch.distributed.is_available() else False):
            return wilson_interval(self.hits.item(), self.total.item())

    def count(self) -> int:
        """Return how many were seen, over all ranks."""
        with self.sync_context(should_sync=torch.distributed.is_initialized() if torch.distributed.is_available() else False):
            return int(self.total.item())
