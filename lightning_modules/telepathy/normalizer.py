"""Normalisation of source states by statistics that are taken before training.

Shapes: B batch, S source positions, N positions of a whole batch, C source width.
"""

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from lightning import LightningModule
from torch import Tensor, nn

from lightning_modules.core.held_out import held_out_batches
from lightning_modules.telepathy.ranks import summed

NormalizerName = Literal["none", "layer_norm", "statistical", "learned_statistical"]

CALIBRATION = 256  # held-out questions from which the statistics are taken


class StatisticalNormalizer(nn.Module):
    """Standardise each feature by the source's own statistics: (x - mean) / std · scale.

    With `learned`, scale and mean of each feature of the output are trained, from `scale` and 0 on.

    The notes used the scale of the target's embeddings (about 0.003) *before* the cross-attention, which makes the
    attention uniform. The default scale of 1 avoids this flaw.

    Args:
        width: C.
        scale: Root mean square of the output.
        learned: Train scale and mean of the output.
    """

    mean_C: Tensor
    std_C: Tensor

    def __init__(self, width: int, scale: float = 1.0, learned: bool = False):
        super().__init__()
        self.scale = scale
        self.register_buffer("mean_C", torch.zeros(width))
        self.register_buffer("std_C", torch.ones(width))
        self.scale_C = nn.Parameter(torch.full([width], scale)) if learned else None
        self.shift_C = nn.Parameter(torch.zeros(width)) if learned else None

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
        unit_BSC = (states_BSC - self.mean_C) / self.std_C
        if self.scale_C is None or self.shift_C is None:
            return unit_BSC * self.scale
        return unit_BSC * self.scale_C + self.shift_C


def sums(states: Iterable[Tensor]) -> Tensor:
    """Return sums_3C of batches states_NC: for each feature the sum, the sum of squares, and the number of states."""
    states_NC = torch.cat(list(states)).double()
    return torch.stack([states_NC.sum(0), states_NC.square().sum(0), torch.full_like(states_NC[0], len(states_NC))])


def calibrate(module: LightningModule, normalizer: nn.Module, read: Callable[[Any], Tensor]) -> None:
    """Measure the statistics of a normalizer on held-out questions, if it has statistics. Every rank must call it.

    Those of a checkpoint stay, whatever the data of this run is: the bridge was trained with them.

    Args:
        module: The module of the run.
        normalizer: Its normalizer.
        read: Returns the states_BSC of a batch.

    Raises:
        UserError: The data gives no held-out questions.
    """
    if not isinstance(normalizer, StatisticalNormalizer) or module.trainer.ckpt_path is not None:
        return
    held_out = held_out_batches(module.trainer, CALIBRATION, "model.normalizer")
    batches = map(module.trainer.strategy.batch_to_device, held_out)
    sums_3C = sums(read(batch)[batch["source_mask"]] for batch in batches)
    normalizer.calibrate(*summed(module, sums_3C))


def make_normalizer(kind: NormalizerName, width: int, notes_scale: float | None = None) -> nn.Module:
    """Return the normalizer of source states.

    Args:
        kind: Its kind.
        width: C.
        notes_scale: The scale of the notes, who always standardised: any kind but `learned_statistical` then means
            `statistical`, at this scale.
    """
    match kind:
        case "statistical" | "learned_statistical":
            return StatisticalNormalizer(width, notes_scale or 1.0, kind == "learned_statistical")
        case _ if notes_scale is not None:
            return StatisticalNormalizer(width, notes_scale)
        case "layer_norm":
            return nn.LayerNorm(width, elementwise_affine=False)
        case _:  # "none", or the null of a config
            return nn.Identity()
