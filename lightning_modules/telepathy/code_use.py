"""How many codes a bottleneck uses.

Shapes: N codes of a batch, V codes of the codebook.
"""

import torch
from torch import Tensor
from torchmetrics import Metric


def perplexity(counts_V: Tensor) -> Tensor:
    """Return exp of the entropy of codes, from how often each occurs; 1 of no codes.

    As many codes, used equally, have the same entropy.
    """
    entropy: Tensor = torch.special.entr(counts_V.double() / counts_V.sum().clamp_min(1)).sum()
    return entropy.exp()


class CodeUse(Metric):
    """The perplexity of the codes of a whole set. Batches and ranks do not change it.

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
        """Return the perplexity."""
        return perplexity(self.counts_V)
