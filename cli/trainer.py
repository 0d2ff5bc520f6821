"""What every run's trainer has besides what the user configured."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from jsonargparse import Namespace
from lightning.fabric.plugins import CheckpointIO
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    Checkpoint,
    DeviceStatsMonitor,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelSummary,
    ProgressBar,
)
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden

from callbacks.divergence import Divergence
from callbacks.last_checkpoint import LastCheckpoint
from cli.checkpoint_io import WholeFiles
from cli.output import ParameterTable
from cli.progress_bar import LossBar
from cli.restoring import Restoring
from cli.run_folder import check_folder
from cli.user_errors import is_too_large
from datamodules.errors import UserError

T = TypeVar("T")
NEED_LOGGER = (DeviceStatsMonitor, LearningRateMonitor)
OFF_IN_BAREBONES = (Checkpoint, *NEED_LOGGER, ModelSummary, ProgressBar)


class NoSignals(_SignalConnector):
    """Leaves signals to `Interruption`: Lightning's own handlers make exit code 0 of SIGTERM and may never return."""

    def register_signal_handlers(self) -> None:
        """Set no handlers."""


def make_trainer(make: Callable[[], Trainer]) -> Trainer:
    """Return a trainer that leaves signals alone and says what it cannot restore.

    Args:
        make: Makes the trainer.

    Raises:
        UserError: Lightning refuses a flag.
    """
    try:
        trainer = make()
    except (ImportError, RuntimeError, TypeError, ValueError) as error:  # flags that Lightning checks itself
        raise UserError(f"trainer: {error}") from error
    trainer._signal_connector = NoSignals(trainer)
    trainer._checkpoint_connector = Restoring(trainer)
    return trainer


def build(class_type: type[T], *args: Any, **kwargs: Any) -> T:
    """Build an object that the config names.

    Raises:
        UserError: A class of torch or Lightning refuses its arguments, or needs a package that is not installed; or
            an object of these sizes does not fit into memory.
    """
    try:
        return class_type(*args, **kwargs)
    except (MemoryError, RuntimeError) as error:
        if not is_too_large(error):
            raise
        raise UserError(f"{class_type.__name__}: it does not fit into memory, choose smaller sizes") from error
    except Exception as error:  # each class of a library has errors of its own for its arguments
        if isinstance(error, UserError) or class_type.__module__.partition(".")[0] not in ("lightning", "torch"):
            raise
        raise UserError(f"{class_type.__name__}: {error}") from error


def with_defaults(flags: Namespace, folder: Path, minutes: float, *always: Callback) -> dict[str, Any]:
    """Return the trainer flags that complete the user's: callbacks, folder, TensorBoard, no summary by Lightning.

    Args:
        flags: The user's trainer flags, with callbacks and loggers built.
        folder: The run's folder.
        minutes: Time between two checkpoints.
        always: Callbacks that every run has.

    Raises:
        UserError: A logger cannot write into its folder, or there are two callbacks with one place in a checkpoint.
    """
    users = _callbacks(flags)
    _refuse_twice(users)
    if flags.barebones:
        quiet = {"default_root_dir": folder, "log_every_n_steps": None, "num_sanity_val_steps": None}
        kept = _without(users, OFF_IN_BAREBONES, "trainer.barebones")
        return quiet | {"callbacks": [*kept, Divergence(), *always]}
    if not flags.logger and flags.logger is not None:
        users = _without(users, NEED_LOGGER, "trainer.logger false")
    added: list[Callback] = [Divergence()]
    changed: dict[str, Any] = {"default_root_dir": folder}
    if flags.enable_progress_bar is not False and not _has(users, ProgressBar):
        # A refresh waits for the device, and in a log file each refresh is one line.
        added.append(LossBar(refresh_rate=10 if sys.stdout.isatty() else 100))
    saves = flags.enable_checkpointing is not False and not flags.fast_dev_run
    if saves and not _has(users, LastCheckpoint):
        added.append(LastCheckpoint(minutes))
    for callback in users if saves else []:
        if isinstance(callback, ModelCheckpoint) and callback.save_last:
            rank_zero_warn("trainer.callbacks: save_last of ModelCheckpoint is ignored, every run has its last.ckpt")
            callback.save_last = None
    plugins = flags.plugins if isinstance(flags.plugins, list) else [flags.plugins] if flags.plugins else []
    if not any(isinstance(plugin, CheckpointIO) for plugin in plugins):
        changed["plugins"] = [*plugins, WholeFiles()]
    if flags.enable_model_summary is not False and not _has(users, ModelSummary):
        added.append(ParameterTable())
        changed["enable_model_summary"] = False  # Lightning's summary shows FLOPs that it has not counted
    for logger in flags.logger if isinstance(flags.logger, list) else [flags.logger]:
        if isinstance(logger, Logger) and logger.save_dir:
            check_folder(Path(logger.save_dir), "trainer.logger")
    if flags.logger is None or flags.logger is True:
        changed["logger"] = TensorBoardLogger(folder, name="", version="", default_hp_metric=False)
    return changed | {"callbacks": [*users, *added, *always]}


def _without(users: list[Callback], kinds: tuple[type[Callback], ...], flag: str) -> list[Callback]:
    """Return the callbacks of other kinds, and warn of those that are left out, which Lightning would refuse."""
    kept = [callback for callback in users if not isinstance(callback, kinds)]
    if left_out := ", ".join(type(callback).__name__ for callback in users if callback not in kept):
        rank_zero_warn(f"{flag} turns off what these callbacks need, which are left out: {left_out}")
    return kept


def _callbacks(flags: Namespace) -> list[Callback]:
    callbacks: list[Callback] | Callback | None = flags.callbacks
    if callbacks is None:
        return []
    return callbacks if isinstance(callbacks, list) else [callbacks]


def _refuse_twice(callbacks: list[Callback]) -> None:
    """Refuse callbacks with one place in a checkpoint, as Lightning does in five sentences."""
    keys = set()
    for callback in callbacks:
        if not is_overridden("state_dict", callback):
            continue
        if callback.state_key in keys:
            kind = type(callback).__name__
            raise UserError(f"trainer.callbacks: there are two {kind} that a checkpoint cannot tell apart, keep one")
        keys.add(callback.state_key)


def _has(callbacks: list[Callback], kind: type[Callback]) -> bool:
    return any(isinstance(callback, kind) for callback in callbacks)
