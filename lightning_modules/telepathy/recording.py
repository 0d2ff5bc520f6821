"""A bridge's training step as CUDA graphs: its batches are padded to few shapes and passed as tensors side by side."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, cast

import torch
from lightning import Trainer
from torch import Tensor
from torch.nn.functional import pad

from datamodules.batch import IGNORE
from lightning_modules.core.contracts import connected
from lightning_modules.core.graphs import GraphedStep, obstacle
from lightning_modules.telepathy.batch import TrainingBatch
from lightning_modules.telepathy.layout import Packing

if TYPE_CHECKING:
    from lightning_modules.telepathy.training import BridgeTraining

MULTIPLE = 64  # of the lengths of rows in recorded batches
LABELS = 4 * MULTIPLE  # of the number of their answer tokens
RECORDED = ("lm", "batch_diversity", "contrastive")  # objectives that padding does not change


def why_not(module: "BridgeTraining", trainer: Trainer) -> str | None:
    """Return why the steps of a fit cannot be recorded, or None."""
    others = [str(name) for name in module.objectives if name not in RECORDED]
    if others:
        return f"model.objectives has {', '.join(others)}"
    if module.bottleneck.size or module.text_prefix is not None or module.cache_source:
        return "it cannot be combined with model.bottleneck, model.text_prefix or model.cache_source"
    if module.bridge.soft_tokens is None or module.bridge.samples:
        return "the bridge draws noise, or its number of soft tokens depends on the question"
    if getattr(connected(trainer).datamodule, "max_tokens", None):
        return "data.max_tokens makes batches of many sizes"
    if module.source.model.reads_padding:
        return "the source reads padding"
    return obstacle(trainer)


class RecordedLosses:
    """The `losses` of a module in training, from CUDA graphs.

    Args:
        module: The module.
    """

    def __init__(self, module: "BridgeTraining"):
        self.losses, self.names = module.losses, [str(name) for name in module.objectives]
        self.most = {"source": module.source.positions, "soft": module.target.positions}
        self.graphed = GraphedStep(module, self._step)

    def __call__(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the losses, and each loss by name, without its gradient."""
        self.batch = padded(batch, self.most["source"], self.most["soft"])
        total, loss_N = self.graphed(*tensors(self.batch))
        return total, dict(zip(self.names, loss_N.unbind(), strict=True))

    def _step(self, *parts: Tensor) -> tuple[Tensor, Tensor]:
        total, losses = self.losses(with_tensors(self.batch, parts))
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
