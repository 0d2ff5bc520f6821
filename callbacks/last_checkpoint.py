"""A checkpoint of the model as it is when training ends."""

from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LastCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint with `last.ckpt`, which also saves after the last step.

    Lightning saves after validations alone, so where steps follow the last of them, `last.ckpt` would not be the model
    that is tested. The last step is told by `max_steps`, or by whatever stops the trainer, such as `max_time`.
    """

    def __init__(self) -> None:
        super().__init__(save_last=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves after the last step: here and not at the end of fit, where the loops have gone on to the next epoch."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._ends(trainer) and not self._should_skip_saving_checkpoint(trainer):
            candidates = self._monitor_candidates(trainer)
            self._save_topk_checkpoint(trainer, candidates)
            self._save_last_checkpoint(trainer, candidates)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Saves after a validation that follows the last step once more, for what it changed in other callbacks."""
        if self._ends(trainer):
            self._last_global_step_saved = 0
        super().on_validation_end(trainer, pl_module)

    @staticmethod
    def _ends(trainer: Trainer) -> bool:
        stops = trainer.should_stop and trainer.fit_loop._can_stop_early  # else `min_steps` or `min_epochs` go on
        return stops or trainer.global_step == trainer.max_steps
