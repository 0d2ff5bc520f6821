"""The reading of `--ckpt_path` by Lightning, which ends in one sentence where a state does not fit its owner."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from torch import OutOfMemoryError

from cli.user_errors import NO_MEMORY
from datamodules.errors import UserError
from lightning_modules.core.checkpoints import describe_mismatch


class Restoring(_CheckpointConnector):
    """Tells which checkpoint cannot be restored when an owner of a state refuses it: a callback, a loader, a schedule.

    The checks before a run know the parts of a checkpoint that Lightning writes. The rest has forms of its own.
    """

    def _restore_modules_and_callbacks(self, *args: Any, **kwargs: Any) -> None:
        with explained(self._ckpt_path):
            super()._restore_modules_and_callbacks(*args, **kwargs)

    def restore_training_state(self) -> None:
        """Restore loops, optimizers and schedules."""
        with explained(self._ckpt_path):
            super().restore_training_state()


@contextmanager
def explained(path: object) -> Iterator[None]:
    """Tell in one sentence that an owner refuses its state.

    Raises:
        UserError: A state of the checkpoint cannot be restored.
    """
    try:
        yield
    except (UserError, OutOfMemoryError):
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        if NO_MEMORY.search(str(error)):
            raise
        mismatch = describe_mismatch(error) if isinstance(error, RuntimeError) else None
        reason = f": {mismatch}" if mismatch else f" cannot be restored: {type(error).__name__}: {error}"
        raise UserError(f"--ckpt_path: {path}{reason}") from error
