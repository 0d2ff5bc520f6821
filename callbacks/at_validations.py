"""When callbacks measure that do so at validations: always in `validate`, and now and then in a fit."""

from abc import ABC, abstractmethod

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from callbacks.base import EveryNSteps
from datamodules.errors import check_numbers


class AtValidations(Callback, ABC):
    """A callback that measures at the end of `validate`, and of some validations during a fit.

    Args:
        every_n_steps: In a fit, measure at the first validation after each n optimizer steps; 0 for never.

    Raises:
        UserError: The number is negative.
    """

    def __init__(self, every_n_steps: int) -> None:
        check_numbers(type(self).__name__, 0, every_n_steps=every_n_steps)
        self._checks = EveryNSteps(every_n_steps)

    @abstractmethod
    def at_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure; every rank calls it."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the step at which the fit starts or resumes."""
        self._checks.start(trainer.global_step)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure, unless this is a validation of a fit that is not due."""
        if trainer.sanity_checking:
            return
        if trainer.state.fn != TrainerFn.FITTING or self._checks.advance(trainer.global_step):
            self.at_validation(trainer, pl_module)
