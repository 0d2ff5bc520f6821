"""A bridge's training step as CUDA graphs: its batches are padded to few shapes and passed as tensors side by side."""

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from datamodules.batch import IGNORE
from lightning_modules.core.graphs import GraphedStep
from lightning_modules.telepathy.batch import TrainingBatch
from lightning_modules.telepathy.layout import Packing

MULTIPLE = 64  # of the lengths of rows in recorded batches
LABELS = 4 * MULTIPLE  # of the number of their answer tokens
RECORDED = ("lm", "batch_diversity", "contrastive")  # objectives that padding does not change

LossesOf = Callable[[TrainingBatch], tuple[Tensor, dict[str, Tensor]]]


class RecordedLosses:
    """The losses of a module in training, from CUDA graphs.

    Args:
        module: The module.
        losses: Returns the sum of the losses of a batch, and each loss by name.
        source_most: The positions of the source; None if it has no limit.
        target_most: The positions of the target.
    """

    def __init__(self, module: nn.Module, losses: LossesOf, source_most: int | None, target_most: int | None):
        self.losses, self.source_most, self.target_most = losses, source_most, target_most
        self.names: list[str] = []
        self.graphed = GraphedStep(module, self._step)

    def __call__(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the losses, and each loss by name, without its gradient."""
        self.batch = padded(batch, self.source_most, self.target_most)
        total, loss_N = self.graphed(*tensors(self.batch))
        return total, dict(zip(self.names, loss_N.unbind(), strict=True))

    def _step(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        total, losses = self.losses(with_tensors(self.batch, parts))
        self.names = list(losses)
        return total, torch.stack(list(losses.values())).detach()


def padded(batch: TrainingBatch, source_most: int | None, target_most: int | None) -> TrainingBatch:
    """Return a batch whose lengths are multiples of `MULTIPLE`, as far as the models have so many positions."""
    made: dict[str, object] = {}
    for name, x in batch.items():
        if isinstance(x, Packing):
            made[name] = _padded_packing(x, target_most)
        elif name == "soft_mask":
            made[name] = x
        else:
            made[name] = _padded(cast(Tensor, x), 0, source_most if name in ("source", "source_real") else None)
    return cast(TrainingBatch, made)


def _padded_packing(packing: Packing, most: int | None) -> Packing:
    width = packing.tokens_BT.shape[1]
    tokens_BT = _padded(packing.tokens_BT, 0, most)
    predict_N = packing.predict_N // width * tokens_BT.shape[1] + packing.predict_N % width
    return replace(
        packing,
        tokens_BT=tokens_BT,
        column_BT=_padded(packing.column_BT, -1, most),
        predict_N=_padded(predict_N, 0, multiple=LABELS),
        labels_N=_padded(packing.labels_N, IGNORE, multiple=LABELS),
        place_N=_padded(packing.place_N, 0, multiple=LABELS),
    )


def _padded(x: Tensor, value: int, most: int | None = None, multiple: int = MULTIPLE) -> Tensor:
    width = -(-x.shape[-1] // multiple) * multiple
    return pad(x, (0, (width if most is None else min(width, most)) - x.shape[-1]), value=value)


def tensors(batch: TrainingBatch) -> list[Tensor]:
    """Return all tensors of a batch."""
    parts: list[Tensor] = []
    for x in batch.values():
        values = [getattr(x, field.name) for field in fields(x)] if isinstance(x, Packing) else [x]
        parts += [value for value in values if isinstance(value, Tensor)]
    return parts


def with_tensors(batch: TrainingBatch, parts: Sequence[Tensor]) -> TrainingBatch:
    """Return a batch with other tensors in the order of `tensors`."""
    left = list(parts)
    made: dict[str, object] = {}
    for name, x in batch.items():
        if isinstance(x, Packing):
            names = [field.name for field in fields(x) if isinstance(getattr(x, field.name), Tensor)]
            made[name] = replace(x, **cast(dict[str, Any], {name: left.pop(0) for name in names}))
        else:
            made[name] = left.pop(0)
    return cast(TrainingBatch, made)
