"""A checkpoint of the model at the end of training."""

import warnings
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.types import STEP_OUTPUT


class LastCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint with `last.ckpt`, which also saves after the last step of training.

    Lightning saves after validations only. Where training goes on after the last validation, its `last.ckpt` is not the
    model that is tested. The last step is the one at `max_steps`, or the one after which something else stops the
    trainer, such as `max_time`. The command line adds this callback to every run without another checkpoint callback.

    Example::

        trainer:
          callbacks+:
            - {class_path: LastCheckpoint}
    """

    def __init__(self) -> None:
        super().__init__(save_last=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Save after the last step. At the end of fit it would be too late: the loops are in the next epoch then."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._is_last(trainer) and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save again after a validation that follows the last step, because it may change the state of callbacks."""
        if self._is_last(trainer):
            self._last_global_step_saved = 0
        super().on_validation_end(trainer, pl_module)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state without Lightning's warning about scores, which a callback without a monitor does not have."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The dirpath has changed")
            super().load_state_dict(state_dict)

    @staticmethod
    def _is_last(trainer: Trainer) -> bool:
        stops = trainer.should_stop and trainer.fit_loop._can_stop_early  # `min_steps` or `min_epochs` may forbid it
        return stops or trainer.global_step == trainer.max_steps
