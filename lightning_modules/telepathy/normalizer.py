"""Normalisation of source states by statistics that are taken before training.

Shapes: B batch, S source positions, N positions of a whole batch, C source width.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn

from datamodules.errors import UserError
from lightning_modules.core.contracts import SupportsSampleDataloader, connected
from lightning_modules.telepathy.ranks import summed

CALIBRATION = 256  # held-out questions from which the statistics are taken


class StatisticalNormalizer(nn.Module):
    """Standardise each feature by the source's own statistics: (x - mean) / std · scale.

    The notes used the scale of the target's embeddings (about 0.003) *before* the cross-attention, which makes the
    attention uniform. The default scale of 1 avoids this flaw.

    Args:
        width: C.
        scale: Root mean square of the output.
    """

    mean_C: Tensor
    std_C: Tensor

    def __init__(self, width: int, scale: float = 1.0):
        super().__init__()
        self.scale = scale
        self.register_buffer("mean_C", torch.zeros(width))
        self.register_buffer("std_C", torch.ones(width))

    @torch.no_grad()
    def calibrate(self, sum_C: Tensor, square_sum_C: Tensor, count_C: Tensor) -> None:
        """Set mean and standard deviation.

        Args:
            sum_C: Sum of the states over real positions.
            square_sum_C: Sum of their squares.
            count_C: Number of real positions, once per feature.
        """
        mean_C = sum_C / count_C
        self.mean_C.copy_(mean_C)
        self.std_C.copy_((square_sum_C / count_C - mean_C.square()).clamp_min(1e-12).sqrt())

    def forward(self, states_BSC: Tensor) -> Tensor:
        """Return the normalised states_BSC."""
        return (states_BSC - self.mean_C) / self.std_C * self.scale


def sums(states: Iterable[Tensor]) -> Tensor:
    """Return sums_3C of batches states_NC: for each feature the sum, the sum of squares, and the number of states."""
    states_NC = torch.cat(list(states)).double()
    return torch.stack([states_NC.sum(0), states_NC.square().sum(0), torch.full_like(states_NC[0], len(states_NC))])


def calibrate(module: LightningModule, normalizer: nn.Module, read: Callable[[Any], Tensor]) -> None:
    """Measure the statistics of a normalizer on held-out questions, if it has statistics. Every rank must call it.

    Args:
        module: The module of the run.
        normalizer: Its normalizer.
        read: Returns the states_BSC of a batch.

    Raises:
        UserError: The data gives no held-out questions.
    """
    if not isinstance(normalizer, StatisticalNormalizer):
        return
    data: object = connected(module.trainer).datamodule
    if not isinstance(data, SupportsSampleDataloader):
        raise UserError(f"model.normalizer: {type(data).__name__} gives no held-out questions")
    batches = map(module.trainer.strategy.batch_to_device, data.sample_dataloader(CALIBRATION))
    sums_3C = sums(read(batch)[batch["source_mask"]] for batch in batches)
    normalizer.calibrate(*summed(module, sums_3C))


def make_normalizer(kind: Literal["none", "layer_norm", "statistical"], width: int, scale: float) -> nn.Module:
    """Return the normalizer of source states; only the statistical one uses `scale`."""
    match kind:
        case "statistical":
            return StatisticalNormalizer(width, scale)
        case "layer_norm":
            return nn.LayerNorm(width, elementwise_affine=False)
        case _:  # "none", or the null of a config
            return nn.Identity()
