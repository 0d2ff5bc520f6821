"""When callbacks measure that do so at validations: always in `validate`, and now and then in a fit."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.base import EveryNSteps
from callbacks.held_out import validated_weights
from datamodules.errors import check_numbers


class AtValidations(Callback, ABC):
    """A callback that measures at the end of `validate`, and of some validations during a fit.

    It measures the weights that the validation has measured, which may be an average over steps (EMA).

    Checkpoints hold the step up to which validations were counted, so that a resumed run measures where the
    uninterrupted run does: the next validation may be due for a multiple of n that lies before the checkpoint.

    Args:
        every_n_steps: In a fit, measure at the first validation after each n optimizer steps; 0 for never.

    Raises:
        UserError: The number is negative.
    """

    def __init__(self, every_n_steps: int) -> None:
        check_numbers(type(self).__name__, 0, every_n_steps=every_n_steps)
        self._checks = EveryNSteps(every_n_steps)
        self._resumed: int | None = None  # the step up to which validations were counted in a checkpoint

    @abstractmethod
    def at_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure; every rank calls it."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the step at which the fit starts, or from the last validation before the checkpoint."""
        self._checks.start(trainer.global_step if self._resumed is None else self._resumed)
        self._resumed = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, unless this is a validation of a fit that is not due."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn != TrainerFn.FITTING or self._checks.advance(trainer.global_step):
            with validated_weights(trainer, pl_module):
                self.at_validation(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the step of the last validation, up to which validations were counted."""
        # Not by `state_dict`, since Lightning itself refuses two callbacks with one, in five sentences
        checkpoint["callbacks"][self.state_key] = {"last_step": self._checks.last}

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep that step until training starts."""
        state = checkpoint["callbacks"].get(self.state_key, {})
        if trainer.state.fn == TrainerFn.FITTING and "last_step" in state:
            self._resumed = int(state["last_step"])
