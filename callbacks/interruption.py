"""The end of a run by a signal: with a checkpoint, and the same on all ranks."""

import signal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.types import STEP_OUTPUT

from callbacks.base import CommonDecision
from callbacks.last_checkpoint import LastCheckpoint
from lightning_modules.core.contracts import connected
from lightning_modules.core.signals import Signals

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
GRACE = 20.0  # seconds to the end of a step, and again from the saved checkpoint to the end of the process
ADVICE = "the run continues from its last checkpoint with --ckpt_path"


class Interruption(Callback):
    """Ends a run on SIGINT (Ctrl-C), SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2: time limits of clusters send these.

    In training, the run ends with the step: it saves a checkpoint with `LastCheckpoint` and raises `Interrupted`. In
    an evaluation it ends with the batch, elsewhere at once. Several ranks agree on the step. A second signal ends the
    process at once, and so does a step that takes longer than 20 seconds. The command line adds this
    callback to every run.

    Args:
        signals: Takes the signals, as long as the block lasts that it is used in.
    """

    def __init__(self, signals: Signals) -> None:
        self.signals = signals
        self._agree = CommonDecision()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on, a signal waits for the end of the step."""
        self.signals.quiet = not trainer.is_global_zero
        self.signals.hold("the run ends after this step, with a checkpoint")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """End the run if any rank has received a signal; the checkpoint may take its time."""
        received = self.signals.received is not None
        if trainer.fit_loop._should_accumulate() or not self._agree(trainer, received):
            return
        self.signals.received = self.signals.received or signal.SIGTERM  # the signal was another rank's
        self.signals.suspend_deadline()
        for callback in connected(trainer).callbacks:
            if isinstance(callback, LastCheckpoint):
                callback.save(trainer)
        self.signals.renew_deadline()
        self.signals.agreed = True
        self.signals.check()

    def on_validation_batch_end(self, *arguments: object, **_: object) -> None:
        """End the run; in fit, the checkpoint was saved before the validation."""
        self.signals.check()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on, a signal ends the run at once."""
        self.signals.let_go()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on, a signal waits for the end of the batch."""
        self.signals.quiet = not trainer.is_global_zero
        self.signals.hold("the run ends after this batch")

    def on_test_batch_end(self, *arguments: object, **_: object) -> None:
        """End the run."""
        self.signals.check()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on, a signal ends the run at once."""
        self.signals.let_go()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """From now on, a signal ends the run at once."""
        self.signals.hold("")


def end_ranks(trainer: Trainer | None) -> None:
    """End the processes that Lightning has started for the other ranks on this node."""
    launcher = trainer.strategy.launcher if trainer else None
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGKILL)
