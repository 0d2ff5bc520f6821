"""Callbacks of runs that are killed."""

import os
import signal
import time

from lightning import Callback


class SlowSteps(Callback):
    """Waits in each training step and each test batch, and appends the number of each step to `steps.txt`.

    Args:
        seconds: Waiting time.
    """

    def __init__(self, seconds: float = 0.004) -> None:
        self.seconds = seconds

    def on_train_batch_end(self, trainer, *_):
        time.sleep(self.seconds)
        steps = os.open(os.path.join(trainer.default_root_dir, "steps.txt"), os.O_APPEND | os.O_CREAT | os.O_WRONLY)
        os.write(steps, f"{trainer.global_step}\n".encode())
        os.close(steps)

    def on_validation_batch_end(self, *_):
        time.sleep(self.seconds)

    def on_test_batch_end(self, *_):
        time.sleep(20 * self.seconds)


class KillAt(Callback):
    """Kills the process in a step.

    Args:
        step: Number of the steps before it.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_before_optimizer_step(self, trainer, *_):
        if trainer.global_step == self.step:
            os.kill(os.getpid(), signal.SIGKILL)
