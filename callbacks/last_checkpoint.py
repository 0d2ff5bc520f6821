"""The checkpoint from which a run can go on, written in time."""

import random
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT

from callbacks.base import CommonDecision, check_positive
from lightning_modules.core.files import keep_as, replacing
from lightning_modules.core.reporting import is_dry_run
from lightning_modules.core.samples import gather_objects

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"


class LastCheckpoint(Checkpoint):
    """Writes `checkpoints/last.ckpt` in the run's folder, and keeps the checkpoint before it as `previous.ckpt`.

    It saves before each validation, after the last step, and whenever the last save is `every_minutes` ago, always
    after an optimizer step. A run that resumes from a checkpoint that was saved before a validation begins with that
    validation, and has the random numbers of the uninterrupted run. A run that resumes from its last step trains
    nothing and leaves a copy of that checkpoint. The command line adds this callback to every run, also beside a
    ModelCheckpoint; `checkpoint_minutes` sets its interval.

    Example::

        trainer:
          callbacks+:
            - {class_path: LastCheckpoint, init_args: {every_minutes: 1}}

    Args:
        every_minutes: The most work that is lost when a process is killed. A step that takes longer is lost whole.

    Attributes:
        nothing_trained: Whether the last fit resumed from its last step.
    """

    def __init__(self, every_minutes: float = 5.0) -> None:
        check_positive(self, every_minutes=every_minutes)
        self.every_minutes = every_minutes
        self.nothing_trained = False
        self._folder = Path()
        self._saved_step, self._saved_at, self._save_took = -1, 0.0, 0.0
        self._step_ended = 0.0
        self._time_is_up = CommonDecision()
        self._resumed: dict[str, Any] = {}  # the state in the checkpoint that this fit resumes from
        self._raised = False  # whether `max_steps` is one too many

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the folder, without making it, and forget what an earlier fit resumed from."""
        self._folder, self._resumed = Path(trainer.default_root_dir, "checkpoints"), {}

    # Resume

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep the state until training starts."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._resumed = _checked(checkpoint["callbacks"].get(self.state_key, {}))
            if trainer.strategy.restore_checkpoint_after_setup:  # after `on_fit_start`
                self._admit_validation(trainer)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a fit, in which no step is saved yet."""
        self.nothing_trained, self._saved_step = True, -1
        self._admit_validation(trainer)

    def _admit_validation(self, trainer: Trainer) -> None:
        """Let a fit that resumes between the last step and the validation after it validate: its loop would end."""
        if self._resumed.get("validation_follows") and self._resumed["step"] == trainer.max_steps:
            trainer.fit_loop.epoch_loop.max_steps += 1
            self._raised = True

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the number of steps back, once that validation has begun."""
        if self._raised:
            trainer.fit_loop.epoch_loop.max_steps -= 1
            self._raised = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restore the random states of the checkpoint, if there are as many ranks as then."""
        states = self._resumed.get("random_states", [])
        if len(states) == trainer.world_size:
            _set_random_state(states[trainer.global_rank])
        self.nothing_trained, self._saved_at = False, time.monotonic()
        self._step_ended = self._saved_at

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the checkpoint that the run resumed from, if that was the last step."""
        source = trainer.ckpt_path
        if not (self.nothing_trained and source and trainer.is_global_zero) or is_dry_run(trainer):
            return
        rank_zero_info(f"nothing was trained: {source} is a checkpoint of step {trainer.global_step}, the last one")
        if Path(source).is_file():
            with replacing(self._folder / LAST) as draft:
                shutil.copyfile(source, draft)

    # Saving

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Save if a validation follows, if this was the last step, or if it is time."""
        if trainer.fit_loop._should_accumulate():
            return  # the gradients so far would be lost
        now = time.monotonic()
        step_took, self._step_ended = now - self._step_ended, now
        # After the next step, and the time that a checkpoint takes, it would be too late
        late = now + step_took + self._save_took - self._saved_at > 60 * self.every_minutes
        late = late and now - self._saved_at > 3 * self._save_took  # or saving would be all that the run does
        if self._time_is_up(trainer, late) or validation_follows(trainer) or _is_last(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save again after a validation that follows the last step, because it changes measures and callbacks."""
        self._step_ended = time.monotonic()
        if trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking and _is_last(trainer):
            self._saved_step = -1
            self.save(trainer)

    def save(self, trainer: Trainer) -> None:
        """Save, unless this step is saved already; every rank calls it, after an optimizer step or a validation."""
        if is_dry_run(trainer) or self._saved_step == trainer.global_step:
            return
        began, last = time.monotonic(), self._folder / LAST
        if trainer.is_global_zero and last.is_file():
            keep_as(last, last.with_name(PREVIOUS))
        trainer.save_checkpoint(last, weights_only=False)
        self._saved_step, self._saved_at = trainer.global_step, began
        self._step_ended = time.monotonic()
        self._save_took = self._step_ended - began

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the random states of all ranks, and whether a validation follows; it is then part of the resumed run."""
        state = {"step": trainer.global_step, "random_states": gather_objects(_random_state())}
        state["validation_follows"] = validation_follows(trainer)
        if state["validation_follows"]:
            _stop_before_validation(checkpoint["loops"]["fit_loop"])
        checkpoint["callbacks"][self.state_key] = state


def validation_follows(trainer: Trainer) -> bool:
    """Return whether the trainer is at the end of a training step after which it validates, whatever stops it."""
    loop = trainer.fit_loop.epoch_loop
    progress: Any = loop.batch_progress.total  # Lightning declares a type with fewer counts
    in_step = trainer.state.fn == TrainerFn.FITTING and progress.completed == progress.processed - 1
    if not in_step or getattr(trainer, "_val_check_time_interval", None) is not None:
        return False
    stops, trainer.should_stop = trainer.should_stop, False  # a resumed run does not remember that it was stopped
    try:
        return bool(loop._should_check_val_fx(cast(Any, trainer.fit_loop._data_fetcher)))
    finally:
        trainer.should_stop = stops


def _is_last(trainer: Trainer) -> bool:
    stops = trainer.should_stop and trainer.fit_loop._can_stop_early  # `min_steps` or `min_epochs` may forbid it
    epochs_left = (trainer.max_epochs or -1) - trainer.current_epoch - 1  # negative without a limit
    ends_last_epoch = epochs_left == 0 and trainer.fit_loop.epoch_loop.batch_progress.is_last_batch
    # With several optimizers, the step may jump over the last one
    return stops or ends_last_epoch or 0 <= trainer.max_steps <= trainer.global_step


def _stop_before_validation(loops: dict[str, Any]) -> None:
    """Change the state of the loops so that Lightning resumes at the start of the validation.

    Lightning itself takes a validation for done if the checkpoint is from the end of a training step. It repeats a
    validation if the training step is completed and the validation has started a batch and not processed it.
    """
    for progress in (loops["epoch_loop.batch_progress"][part] for part in ("total", "current")):
        progress["completed"] = progress["processed"]
    validation = loops["epoch_loop.val_loop.batch_progress"]
    for part in ("total", "current"):
        validation[part] = {"ready": 1, "started": 1, "processed": 0, "completed": 0}
    validation["is_last_batch"] = False


def _checked(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return a state of `LastCheckpoint`; raises what a wrong type or value raises, before anything is changed."""
    if not state:
        return {}
    for part in state["random_states"]:
        torch.Generator().set_state(part["torch"])
        random.Random().setstate(_python_state(part))
    return {**state, "step": int(state["step"]), "validation_follows": bool(state["validation_follows"])}


def _random_state() -> dict[str, Any]:
    """Return the random states of this process, as plain data: a checkpoint must be readable without running code."""
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    return state | ({"cuda": torch.cuda.get_rng_state()} if torch.cuda.is_available() else {})


def _python_state(state: Mapping[str, Any]) -> tuple[Any, ...]:
    version, numbers, gauss = state["python"]
    return version, tuple(numbers), gauss


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    random.setstate(_python_state(state))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])
