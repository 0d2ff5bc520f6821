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
    return low if hits else 0.0, high if hits < count else 1.0  # exact where rounding is not


class Proportion(Metric):
    """The share of hits among all that were seen, over all ranks, with its Wilson interval."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, hits: Tensor | float, count: Tensor | int = 1) -> None:
        """Count `hits` among `count`."""
        self.hits += hits
        self.total += count

    def compute(self) -> Tensor:
        """Return (share, low, high, count)."""
        hits, total = self.hits.item(), self.total.item()
        share = hits / total if total else math.nan
        return torch.tensor([share, *wilson_interval(hits, total), total], device=self.hits.device)
