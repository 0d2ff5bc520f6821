"""The progress bar of a run."""

from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

SHOWN = ("train/loss", "validation/loss", "validation/accuracy")


class LossBar(TQDMProgressBar):
    """Lightning's bar with the losses, which are read where the bar is drawn.

    Lightning itself reads what is logged with `prog_bar=True` after each step, drawn or not. On a GPU every step would
    then wait for the device.
    """

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the numbers that stand behind the bar."""
        logged = trainer.callback_metrics
        return super().get_metrics(trainer, pl_module) | {name: logged[name].item() for name in SHOWN if name in logged}
