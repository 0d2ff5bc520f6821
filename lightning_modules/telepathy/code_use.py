"""How many codes a bottleneck uses.

Shapes: N codes of a batch, V codes of the codebook.
"""

import torch
from torch import Tensor
from torchmetrics import Metric


class CodeUse(Metric):
    """The perplexity of the codes of a whole set: exp of their entropy. Batches and ranks do not change it.

    As many codes, used equally, have the same entropy.

    Args:
        size: Number of codes.
    """

    counts_V: Tensor

    def __init__(self, size: int):
        super().__init__()
        self.add_state("counts_V", torch.zeros(size, dtype=torch.double), dist_reduce_fx="sum")

    def update(self, index_N: Tensor) -> None:
        """Count codes."""
        self.counts_V += torch.bincount(index_N, minlength=len(self.counts_V))

    def compute(self) -> Tensor:
        """Return the perplexity; 1 of no codes."""
        share_V = self.counts_V / self.counts_V.sum().clamp_min(1)
        entropy: Tensor = torch.special.entr(share_V).sum()
        return entropy.exp()
