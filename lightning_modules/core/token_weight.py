"""The weight of a rank's mean, with which a mean over ranks is the mean over the tokens of all ranks.

Shapes: S ensemble members, B batch, T positions.
"""

from typing import cast

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from datamodules.batch import IGNORE


def token_weight(module: LightningModule, count: Tensor | int) -> Tensor | float:
    """Return this rank's tokens over the mean of all ranks; 1.0 without other ranks.

    Args:
        module: The module.
        count: The number of tokens, or the sum of their weights: one number, or [S]. Every rank calls it.
    """
    if not _has_ranks(module):
        return 1.0
    own = torch.as_tensor(count, dtype=torch.float32, device=module.device)
    return own / cast(Tensor, module.all_gather(own)).mean(0).clamp(min=1e-12)


def weigh_labels(module: LightningModule, mean: Tensor, labels: Tensor) -> Tensor:
    """Return a rank's mean over labelled positions, times its `token_weight`; as it is without other ranks.

    Args:
        module: The module.
        mean: The mean, a scalar or [S].
        labels: [B, T], or [S, B, T].
    """
    return mean * token_weight(module, (labels != IGNORE).sum((-2, -1))) if _has_ranks(module) else mean


def _has_ranks(module: LightningModule) -> bool:
    return module._trainer is not None and module._trainer.world_size > 1
