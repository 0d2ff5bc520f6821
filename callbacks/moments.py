"""Norms and spreads of an activation, summed over batches and ranks.

Shapes: N positions, C classes, D features.
"""

from typing import cast

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn

from datamodules.batch import IGNORE


class Moments:
    """Sums over one pass, in fp64 because they are subtracted from one another. The class table grows with the labels.

    Attributes:
        totals: Sum of |x|, and sum of |x|^2.
        counts_C: Positions of each class.
        sums_CD: Sum of x over the positions of each class.
        unlabelled: Whether a batch had no labels.
    """

    def __init__(self, device: torch.device) -> None:
        self.totals = torch.zeros(2, dtype=torch.float64, device=device)
        self.counts_C = torch.zeros(0, dtype=torch.float64, device=device)
        self.sums_CD = torch.zeros(0, 0, dtype=torch.float64, device=device)
        self.unlabelled = False

    def add(self, x: Tensor, labels: Tensor | None) -> None:
        """Add the positions of one batch."""
        self.unlabelled |= labels is None
        labels = x.new_zeros(x.shape[:-1], dtype=torch.long) if labels is None else labels
        x_ND, labels_N = x[labels != IGNORE].double(), labels[labels != IGNORE]
        if not len(labels_N):
            return
        self._grow(int(labels_N.max()) + 1, x_ND.shape[1])
        self.totals += torch.stack([x_ND.norm(dim=1).sum(), x_ND.square().sum()])
        self.counts_C.index_add_(0, labels_N, torch.ones_like(x_ND[:, 0]))
        self.sums_CD.index_add_(0, labels_N, x_ND)

    def _grow(self, n_classes: int, n_features: int) -> None:
        new_rows = max(n_classes - len(self.counts_C), 0)
        self.counts_C = nn.functional.pad(self.counts_C, (0, new_rows))
        self.sums_CD = nn.functional.pad(self.sums_CD, (0, n_features - self.sums_CD.shape[1], 0, new_rows))

    def compute(self, strategy: Strategy) -> dict[str, Tensor]:
        """Return the statistics over all ranks; a collective. Empty where no rank had a position."""
        shape = torch.tensor([*self.sums_CD.shape, self.unlabelled], device=self.totals.device)
        n_classes, n_features, unlabelled = _reduce(strategy, shape, "max").tolist()
        self._grow(n_classes, n_features)
        norms, squares = _reduce(strategy, self.totals, "sum")
        counts_C, sums_CD = _reduce(strategy, self.counts_C, "sum"), _reduce(strategy, self.sums_CD, "sum")
        n, occurs_C = counts_C.sum(), counts_C > 0

        statistics = {}
        if n > 0:
            statistics["radius"] = norms / n
        if n > 1:
            statistics["spread.batch"] = ((squares - sums_CD.sum(0).square().sum() / n) / (n - 1)).clamp(min=0).sqrt()
        if n > occurs_C.sum() and not unlabelled:
            between = (sums_CD[occurs_C].square().sum(1) / counts_C[occurs_C]).sum()
            statistics["spread.target"] = ((squares - between) / (n - occurs_C.sum())).clamp(min=0).sqrt()
        return {key: value.cpu() for key, value in statistics.items()}


def _reduce(strategy: Strategy, x: Tensor, how: str) -> Tensor:
    return cast(Tensor, strategy.reduce(x, reduce_op=how))
