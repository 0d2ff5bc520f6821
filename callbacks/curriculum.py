"""Phases of a task that become harder as the held-out accuracy rises."""

from collections.abc import Sized
from typing import Any, Protocol, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn

from callbacks.base import refuse_second
from datamodules.errors import UserError, check_numbers
from datamodules.tunable_task import TunableTask
from lightning_modules.core.contracts import connected
from lightning_modules.core.reporting import keep_scalars, log_scalars

METRIC = "validation/accuracy"


class OverfitsBatches(Protocol):
    """An attribute that Lightning sets on every trainer but does not declare."""

    overfit_batches: int | float


class Curriculum(Callback):
    """Trains on phases of a task; each begins when the held-out accuracy of the phase before it reaches `threshold`.

    A phase sets some knobs of the task: arguments that may change during training, such as `needles`, `seq_len` and
    `distance` of `NeedleGym`, `train_len` of `StateTracking`, and `weights` of a `Mixture` with the knobs of its tasks.
    Knobs that a phase does not name keep their values under `data`, as in the last phase below. `data` also decides
    the test set, and no phase may have longer rows or more tokens than `data`.

    Each validation uses new rows of the current phase, held out from training, and its accuracy is the share of correct
    queries (labelled positions), for an ensemble the mean over members. There is no other way to advance. The next
    phase begins with the first batch that no worker of the loader has prepared: the next one with `data.num_workers` 0.

    It logs `curriculum/phase` (from 0) at each validation, and `curriculum/step_<i>`, the optimizer step at which phase
    i was reached. Checkpoints hold the phases that began, so that a resumed run has the batches of the uninterrupted
    one.

    Example::

        trainer:
          val_check_interval: 100
          check_val_every_n_epoch: null
          callbacks+:
            - class_path: Curriculum
              init_args:
                threshold: 0.95
                phases: [{needles: 2, seq_len: 64}, {needles: 8, seq_len: 256}, {}]

    Args:
        phases: The knobs of each phase.
        threshold: Validation accuracy at which the next phase begins.

    Raises:
        UserError: There is no phase, or the threshold is not in [0, 1]; at `setup`, the data has no knobs, a knob does
            not fit, there are two curricula, `trainer.overfit_batches` is set or `trainer.limit_val_batches` is 0; at
            the end of a validation, the module logs no accuracy; on resuming, the phases so far are not those of the
            checkpoint.
    """

    def __init__(self, phases: list[dict[str, Any]], threshold: float = 0.95) -> None:
        if not phases:
            raise UserError("Curriculum.phases is empty: give the knobs of at least one phase")
        check_numbers("Curriculum", 0, 1, threshold=threshold)
        self.phases, self.threshold = phases, threshold
        self._state: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the phases to the task, and forget an earlier fit."""
        if stage != "fit":
            return
        refuse_second(trainer, self)
        if cast(OverfitsBatches, trainer).overfit_batches:
            raise UserError("Curriculum: trainer.overfit_batches repeats the first batches, so no phase could follow")
        if not trainer.limit_val_batches:
            raise UserError("Curriculum: trainer.limit_val_batches is 0, and without validations no phase could follow")
        self._state = {"starts": [0], "steps": [0], "phases": self.phases}
        self._task(trainer).plan(self.phases)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the phases that a checkpoint has restored."""
        self._task(trainer).begun = self._state["starts"]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Advance if the accuracy is high enough, and log the phase."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        if METRIC not in trainer.callback_metrics:
            raise UserError(f"Curriculum: {type(pl_module).__name__} logs no {METRIC}, by which phases advance")
        steps = self._state["steps"]
        if len(steps) < len(self.phases) and trainer.callback_metrics[METRIC] >= self.threshold:
            task = self._task(trainer)
            task.advance(_next_batch(trainer))
            self._state["starts"] = task.begun
            steps.append(trainer.global_step)
        measures = {f"curriculum/step_{phase}": float(step) for phase, step in enumerate(steps)}
        measures["curriculum/phase"] = float(len(steps) - 1)
        log_scalars(trainer, measures)
        keep_scalars(trainer, measures)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell if a phase never began."""
        last, end = len(self._state["steps"]) - 1, len(self.phases) - 1
        if last < end:
            why = f"no validation in it reached an accuracy of {self.threshold}"
            rank_zero_warn(f"Curriculum: the training ended in phase {last} of 0 to {end}: {why}")

    def state_dict(self) -> dict[str, Any]:
        """Return the phases, and the first batches and steps of those that began."""
        return dict(self._state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the phases that began; only a fit has phases."""
        if not self._state:
            return
        begun = len(state_dict["starts"])
        if self.phases[:begun] != state_dict["phases"][:begun]:
            raise UserError(
                f"Curriculum.phases: the checkpoint is in phase {begun - 1}, after {state_dict['phases'][:begun]}, and "
                f"the config begins with {self.phases[:begun]}"
            )
        self._state = dict(state_dict) | {"phases": self.phases}

    def _task(self, trainer: Trainer) -> TunableTask:
        task = connected(trainer).datamodule
        if not isinstance(task, TunableTask):
            raise UserError(
                f"Curriculum: {type(task).__name__} has no knobs; "
                f"{', '.join(sorted(tunable.__name__ for tunable in TunableTask.__subclasses__()))} have"
            )
        return task


def _next_batch(trainer: Trainer) -> int:
    """Return the number of the next training batch over all epochs."""
    return (
        trainer.current_epoch * len(cast(Sized, trainer.train_dataloader)) + trainer.fit_loop.epoch_loop.batch_idx + 1
    )
