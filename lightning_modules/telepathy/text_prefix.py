"""Learned vectors before the question's text: how well the target answers once it knows what is asked of it.

Shapes: B batch, K vectors, D target width.
"""

import torch
from lightning import LightningModule
from lightning.pytorch.plugins import MixedPrecision, Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_modules.core.seeding import seeded_generator

STREAM = 0x7E57  # first number of the seed, which keeps the random numbers apart from those of other owners


class TextPrefix(nn.Module):
    """K learned vectors that the target reads before the text of the question (prompt tuning, Lester et al. 2021).

    A bridge learns the form of the answers together with what soft tokens say. The prefix learns the form alone, from
    the same data in the same steps, so the difference between them is what soft tokens carry.

    Args:
        count: K.
        width: D.
        scale: Root mean square of the vectors at the start, such as that of the embeddings.
    """

    def __init__(self, count: int, width: int, scale: float):
        super().__init__()
        self.scale = scale
        # Of size 1, to which rates of learning are fitted; from a generator of its own, so that a bridge beside it has
        # the random numbers that it has without it
        drawn_KD = torch.randn(count, width, generator=seeded_generator(STREAM, torch.initial_seed()), device="cpu")
        self.vectors_KD = nn.Parameter(torch.empty(count, width).copy_(drawn_KD))

    def vectors(self, size: int) -> Tensor:
        """Return vectors_BKD for a batch of `size` rows, all real."""
        return (self.scale * self.vectors_KD).expand(size, -1, -1)

    def mask(self, size: int) -> Tensor:
        """Return mask_BK, all true, on the CPU."""
        return torch.ones(size, len(self.vectors_KD), dtype=torch.bool)


def clip_apart(
    module: LightningModule,
    prefix: TextPrefix | None,
    optimizer: Optimizer,
    value: float | None,
    algorithm: str | None,
) -> None:
    """Clip the gradient of a module, and apart from it that of its text prefix, which must not change it.

    Args:
        module: The module.
        prefix: Its text prefix, if there is one.
        optimizer: Its optimizer.
        value: The bound; nothing is clipped without one.
        algorithm: `norm` or `value`, which clips each element by itself.
    """
    if prefix is None or not value or algorithm == "value":
        _clip(module, optimizer, value, algorithm)
        return
    apart = list(prefix.parameters())  # in order: a norm over a set would have other last bits in each run
    known = set(apart)
    others = [p for group in optimizer.param_groups for p in group["params"] if p not in known]
    for part in (apart, others):
        torch.nn.utils.clip_grad_norm_(part, value)


def _clip(module: LightningModule, optimizer: Optimizer, value: float | None, algorithm: str | None) -> None:
    """Clip the gradients of all parameters of an optimizer, a fused one too."""
    plugin = module.trainer.precision_plugin
    if value and isinstance(plugin, MixedPrecision) and plugin.scaler is None:
        # Lightning refuses a fused optimizer here, which is for a scaler of gradients alone, and bf16 has none
        Precision.clip_gradients(plugin, optimizer, value, GradClipAlgorithmType(algorithm or "norm"))
        return
    module.clip_gradients(optimizer, value, algorithm)
