"""A callback after which files cannot grow, as on a full disk."""

import resource

from lightning import Callback


class FullDisk(Callback):
    """Limits the size of every file that the run writes from a step on.

    Args:
        at_step: The optimizer step.
        size: Bytes; a record is smaller, a checkpoint larger.
    """

    def __init__(self, at_step: int, size: int = 20_000) -> None:
        self.at_step, self.size = at_step, size

    def on_train_batch_start(self, trainer, *_):
        if trainer.global_step == self.at_step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
