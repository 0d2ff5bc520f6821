"""The end of a run by a signal: in order, with a checkpoint, and in any case."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.utilities.types import STEP_OUTPUT

from callbacks.base import CommonDecision
from callbacks.last_checkpoint import LastCheckpoint
from lightning_modules.core.contracts import connected

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
GRACE = 20.0  # seconds to the end of a step, and again from the saved checkpoint to the end of the process
REPEATED = 1.0  # seconds in which a second signal is taken for the same one, sent to a process and to its group


class Interrupted(BaseException):
    """The run was ended by a signal. It is no `Exception`, so that no library takes it for an error of its own.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as shells count."""
        return 128 + self.number


class Interruption(Checkpoint):
    """Ends a run on SIGINT (Ctrl-C), SIGTERM, SIGHUP, SIGUSR1 or SIGUSR2: time limits of clusters send these.

    In training, the run ends with the step: it saves a checkpoint with `LastCheckpoint` and raises `Interrupted`. In
    an evaluation it ends with the batch, elsewhere at once. Several ranks agree on the step. A second signal ends the
    process at once, and so does a step that takes longer than 20 seconds. The command line adds this callback to every
    run.

    Use it as a context: it takes the signals inside the block. Signals that are ignored when the block begins, such as
    those of a background process, stay so.

    Attributes:
        received: The first signal, or None.
        before_end: Called before the process is ended at once.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self.before_end: Callable[[], None] = lambda: None
        self._over = threading.Event()
        self._received_at = 0.0
        self._deadline = float("inf")
        self._trainer: Trainer | None = None  # while the run is in a loop over batches
        self._agree = CommonDecision()
        self._handlers: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():  # the only thread that may set handlers
            current = {number: signal.getsignal(number) for number in SIGNALS}
            self._handlers = {number: old for number, old in current.items() if old != signal.SIG_IGN}
            for number in self._handlers:
                signal.signal(number, self._receive)
        return self

    def __exit__(self, *error: object) -> None:
        for number, old in self._handlers.items():
            signal.signal(number, old)
        self._over.set()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received is not None:
            if now - self._received_at > REPEATED:
                self._end_process()
            return
        self.received, self._received_at, self._deadline = number, now, now + GRACE
        threading.Thread(target=self._watch, daemon=True).start()
        if self._trainer is None:
            raise Interrupted(number)
        if self._trainer.is_global_zero:
            when = "after this step, with a checkpoint" if self._trainer.training else "after this batch"
            self._say(f"{signal.Signals(number).name}: the run ends {when}; a second signal ends it at once")

    def _watch(self) -> None:
        """End the process at the deadline, for a step or a library may never return."""
        while not self._over.wait(0.2):
            if time.monotonic() > self._deadline:
                self._say("the run did not end in time and is ended now")
                self._end_process()

    def _end_process(self) -> None:
        try:
            self.before_end()
            end_ranks(self._trainer)
        finally:
            os._exit(128 + (self.received or 0))

    @staticmethod
    def _say(sentence: str) -> None:
        os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{sentence}\n".encode())  # safe in a handler

    # Where a run can end

    def _enter_loop(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def _leave_loop(self) -> None:
        self._trainer = None
        self._check()

    def _check(self) -> None:
        if self.received is not None:
            raise Interrupted(self.received)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on, a signal waits for the end of the step."""
        self._enter_loop(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """End the run if any rank has received a signal; the checkpoint may take its time."""
        if trainer.fit_loop._should_accumulate() or not self._agree(trainer, self.received is not None):
            return
        self.received = self.received or signal.SIGTERM  # the signal was another rank's
        self._deadline = float("inf")
        for callback in connected(trainer).callbacks:
            if isinstance(callback, LastCheckpoint):
                callback.save(trainer)
        self._deadline = time.monotonic() + GRACE
        self._check()

    def on_validation_batch_end(self, *arguments: object, **_: object) -> None:
        """End the run; in fit, the checkpoint was saved before the validation."""
        self._check()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on, a signal ends the run at once."""
        self._leave_loop()

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on, a signal waits for the end of the batch."""
        self._enter_loop(trainer)

    def on_test_batch_end(self, *arguments: object, **_: object) -> None:
        """End the run."""
        self._check()

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """From now on, a signal ends the run at once."""
        self._leave_loop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """From now on, a signal ends the run at once."""
        self._trainer = None


def end_ranks(trainer: Trainer | None) -> None:
    """End the processes that Lightning has started for the other ranks on this node."""
    launcher = trainer.strategy.launcher if trainer else None
    if isinstance(launcher, _SubprocessScriptLauncher):
        launcher.kill(signal.SIGKILL)
