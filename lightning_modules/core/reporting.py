"""Measures of an ensemble: one value for each member, told together.

A module that trains S seeds as one program says so by `ensemble: int` (1 for an ordinary module); each of its trained
parameters then has a first axis of S, under the name that it has in an ordinary module.

Shapes: S members.
"""

from collections.abc import Collection, Mapping

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from datamodules.errors import UserError
from lightning_modules.core.metrics import wilson_interval


def ensemble_size(module: torch.nn.Module) -> int:
    """How many members a module trains at once; 1 for an ordinary one."""
    return getattr(module, "ensemble", 1)


def report_members(
    trainer: Trainer, module: LightningModule, measures: Mapping[str, Tensor], shares: Collection[str] = ()
) -> None:
    """Log the mean over members of each measure, and keep every member's value for the run's record.

    Goes to the loggers and to `trainer.callback_metrics` at once, from any hook. The values have to be the same on
    every rank already. NaN stands for a member that has no value; means leave it out.

    Args:
        trainer: The trainer.
        module: The module; its dictionary `members` takes the values, where it has one.
        measures: Name -> values_S.
        shares: Those of them that are 0 or 1 for each member, which is one sample of a share: the module's `counts` and
            `intervals`, where it has them, take that.
    """
    means = {name: values_S.detach().float().nanmean() for name, values_S in measures.items()}
    trainer.callback_metrics.update({name: value.cpu() for name, value in means.items()})
    step = trainer.fit_loop.epoch_loop._batches_that_stepped  # what Lightning's own scalars are logged at
    for logger in trainer.loggers:
        logger.log_metrics({name: value.item() for name, value in means.items()}, step=step)
    if (members := getattr(module, "members", None)) is not None:
        members.update({name: values_S.detach().float().cpu() for name, values_S in measures.items()})
    if hasattr(module, "counts") and hasattr(module, "intervals"):
        for name in shares:
            count_samples(module, name, measures[name], 1)


def count_samples(module: LightningModule, name: str, share_S: Tensor, count: int) -> None:
    """Note behind how many samples each member's share stands, and its interval; an ensemble's are made by a study."""
    module.counts[name] = count
    if ensemble_size(module) == 1:
        module.intervals[name] = wilson_interval(share_S.item() * count, count)


def refuse_second(trainer: Trainer, callback: Callback) -> None:
    """Refuse another callback of the kind, whose measures would have the same names.

    Raises:
        UserError: There is one.
    """
    if any(isinstance(other, type(callback)) and other is not callback for other in trainer.callbacks):
        raise UserError(f"Two {type(callback).__name__} callbacks would log under one name; keep one.")
