"""Held-out samples of a run's datamodule."""

from collections.abc import Iterable
from typing import Any

from lightning.pytorch import Trainer

from datamodules.errors import UserError
from lightning_modules.core.contracts import SupportsSampleDataloader, connected


def held_out_batches(trainer: Trainer, count: int, user: str, samples: str = "questions") -> Iterable[Any]:
    """Return this rank's batches of the first `count` held-out samples of the datamodule, on the CPU.

    Args:
        trainer: The trainer.
        count: Number of samples over all ranks.
        user: Who needs them, for the message.
        samples: What they are, for the message.

    Raises:
        UserError: The datamodule gives none.
    """
    data: object = connected(trainer).datamodule
    if not isinstance(data, SupportsSampleDataloader):
        raise UserError(f"{user}: {type(data).__name__} gives no held-out {samples}")
    return data.sample_dataloader(count)
