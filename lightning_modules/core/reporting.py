"""Recording the measures of a module: one value per ensemble member, with the samples behind each proportion.

A module that trains S seeds as one program has the attribute `ensemble: int` (1 for an ordinary module). Each of its
trained parameters then has a first axis of S, under the name that the parameter has in an ordinary module.

Shapes: S ensemble members.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, runtime_checkable
from weakref import WeakKeyDictionary

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, distributed

from datamodules.batch import HasEnsemble
from lightning_modules.core.contracts import HasCounts, HasMembers, connected
from lightning_modules.core.intervals import wilson_interval

if TYPE_CHECKING:
    from matplotlib.figure import Figure


_last_losses: WeakKeyDictionary[Trainer, dict[str, Tensor]] = WeakKeyDictionary()  # of the last optimizer step


@runtime_checkable
class TakesFigures(Protocol):
    """A logger's writer that takes figures, such as that of TensorBoard."""

    def add_figure(self, tag: str, figure: "Figure", global_step: int) -> None:
        """Add a figure."""
        ...


@runtime_checkable
class TakesTexts(Protocol):
    """A logger's writer that takes texts, such as that of TensorBoard."""

    def add_text(self, tag: str, text_string: str, global_step: int) -> None:
        """Add a markdown text."""
        ...


def ensemble_size(module: torch.nn.Module) -> int:
    """Return the number of members that a module trains at once; 1 for an ordinary module."""
    return module.ensemble if isinstance(module, HasEnsemble) else 1


def logged_step(trainer: Trainer) -> int:
    """Return the step at which Lightning logs scalars now: the number of batches that ended in an optimizer step."""
    return trainer.fit_loop.epoch_loop._batches_that_stepped


def log_losses(module: LightningModule, losses: Mapping[str, Tensor]) -> None:
    """Record the losses of a training step as `train/<name>`, each a mean over the processes of the run.

    `trainer.callback_metrics` and `trainer.logged_metrics` have them after every step, as tensors: a program on a GPU
    does not wait for them. The loggers get them every `log_every_n_steps` steps, and `log_last_losses` gives them those
    of a stop in between. `LightningModule.log` does the same and takes a tenth of a small model's step, since it moves
    each field of each value's record to the device again.

    All processes call it in the same steps. Without a Trainer it does nothing.

    Args:
        module: The module, in its `training_step`.
        losses: Name -> a loss of this process, a scalar.
    """
    trainer = module._trainer
    if trainer is None:
        return
    mean_N = torch.stack([loss.detach().to(torch.get_default_dtype()) for loss in losses.values()])
    if distributed.is_available() and distributed.is_initialized():
        distributed.all_reduce(mean_N)
        mean_N = mean_N / distributed.get_world_size()
    means = {f"train/{name}": mean for name, mean in zip(losses, mean_N.unbind(), strict=True)}
    trainer.callback_metrics.update(means)
    trainer.logged_metrics.update(means)
    if trainer.fit_loop._should_accumulate():
        return
    _last_losses[trainer] = means
    every = connected(trainer).log_every_n_steps  # 0 in barebones mode
    if every and (logged_step(trainer) + 1) % every == 0:
        trainer._logger_connector.log_metrics(means)  # with the epoch; files have the values at once


def log_last_losses(trainer: Trainer) -> None:
    """Log the losses of the step at which training was stopped early, unless the loggers have them; at its end."""
    losses, every, steps = _last_losses.pop(trainer, None), connected(trainer).log_every_n_steps, logged_step(trainer)
    if losses and trainer.should_stop and every and steps % every:
        trainer._logger_connector.log_metrics(losses, step=steps - 1)


def log_scalars(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Log numbers to every logger, at the step of Lightning's scalars."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), step=logged_step(trainer))


def keep_scalars(trainer: Trainer, metrics: Mapping[str, float]) -> None:
    """Put numbers into `trainer.callback_metrics`, which checkpoints, early stopping and the run's record read."""
    trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})


def report_members(
    trainer: Trainer, module: LightningModule, measures: Mapping[str, Tensor], shares: Collection[str] = ()
) -> None:
    """Log the mean over members of each measure, and keep the value of every member for the run's record.

    The means go to the loggers and to `trainer.callback_metrics` at once, from any hook. The values must be the same on
    every rank already. NaN stands for a member without a value; means leave it out.

    Args:
        trainer: The trainer.
        module: The module; its `members` takes the values, if it has that attribute.
        measures: Name -> values_S.
        shares: Names of the measures that are 0 or 1 for each member. Each is one sample of a proportion, which the
            module's `counts`, `hits` and `intervals` record, if it has them.
    """
    means = {name: values_S.detach().float().nanmean().item() for name, values_S in measures.items()}
    log_scalars(trainer, means)
    keep_scalars(trainer, means)
    if isinstance(module, HasMembers):
        module.members.update({name: values_S.detach().float().cpu() for name, values_S in measures.items()})
    if isinstance(module, HasCounts):
        for name in shares:
            record_proportion(module, name, measures[name], 1)


def record_proportion(module: HasCounts, name: str, hits_S: Tensor, count: int) -> None:
    """Record the hits of each member's proportion, the number of samples, and the Wilson interval of a single module.

    NaN stands for a member without a proportion, such as one that diverged; a single module then gets neither hits nor
    an interval. Studies make the intervals over the members of an ensemble.
    """
    hits_S = hits_S.double().reshape(-1)  # torchmetrics gives the value of a single member without its axis
    module.counts[name] = count
    module.hits.pop(name, None)
    module.intervals.pop(name, None)
    if len(hits_S) == 1 and hits_S.isnan():
        return
    module.hits[name] = [0 if hit.isnan() else round(hit.item()) for hit in hits_S]
    if len(hits_S) == 1:
        module.intervals[name] = wilson_interval(module.hits[name][0], count)


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of the run. Under DDP every rank must call it, for `log_dir` is a collective."""
    return Path(trainer.log_dir or trainer.default_root_dir)


def is_dry_run(trainer: Trainer) -> bool:
    """Return whether the trainer only tries a few batches (`fast_dev_run`) and must leave no files."""
    return bool(connected(trainer).fast_dev_run)


def add_figure(trainer: Trainer, name: str, figure: "Figure", step: int | None = None) -> None:
    """Add a figure to every logger that takes figures, at the trainer's step if `step` is None."""
    for logger in trainer.loggers:
        writer = getattr(logger, "experiment", None)
        if isinstance(writer, TakesFigures):
            writer.add_figure(name, figure, trainer.global_step if step is None else step)


def add_text(trainer: Trainer, name: str, markdown: str, step: int | None = None) -> None:
    """Add a markdown text to every logger that takes texts, at the trainer's step if `step` is None."""
    for logger in trainer.loggers:
        writer = getattr(logger, "experiment", None)
        if isinstance(writer, TakesTexts):
            writer.add_text(name, markdown, trainer.global_step if step is None else step)
