"""Checks of a command line and of what its config says, before anything is built: the trainer's numbers, and paths."""

import os
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from cli.run_folder import check_folder
from datamodules.errors import POSITIVE, UserError, check_numbers
from datamodules.sources import check_path, is_broken

COUNTS = ("accumulate_grad_batches", "check_val_every_n_epoch", "log_every_n_steps", "num_nodes")
NOT_NEGATIVE = ("gradient_clip_val", "min_epochs", "min_steps", "reload_dataloaders_every_n_epochs", "fast_dev_run")
FOLDERS = ("dirpath", "save_dir", "save_to")  # into which a run writes
SLOW = (  # what `trainer.barebones` turns off
    *("detect_anomaly", "enable_checkpointing", "enable_model_summary", "enable_progress_bar"),
    *("fast_dev_run", "logger", "profiler"),
)
LIMITS = {  # command -> the flag that limits its batches, and what it does with them
    "fit": ("limit_train_batches", "trained"),
    "validate": ("limit_val_batches", "measured"),
    "test": ("limit_test_batches", "measured"),
    "predict": ("limit_predict_batches", "predicted"),
}
PATHS = {"default_root_dir", "dirpath", "path", "reference", "save_dir", "save_to", "test_path"}


def check_line(line: Sequence[str]) -> None:
    """Check the texts of a command line before they are parsed.

    Raises:
        UserError: A text is not UTF-8, or `--config` names no file of this machine.
    """
    for before, text in pairwise(["", *line]):
        if is_broken(text):
            raise UserError(f"{text!a} on the command line is not a text in UTF-8")
        option, _, value = text.partition("=") if text.startswith("--config=") else (before, "", text)
        if option in ("-c", "--config") and "{" not in value and "\n" not in value:  # else a config itself
            check_path(value, "--config")


def check_flags(command: str | None, config: Mapping[str, Any]) -> None:
    """Check the flags of the trainer that Lightning takes without a word, and all paths; NaN is no setting.

    Args:
        command: Such as `fit`.
        config: The resolved config of the command, as plain types.

    Raises:
        UserError: A number is out of range or NaN, or a text that should be a path is none.
    """
    flags = config["trainer"]
    if not isinstance(flags, Mapping):
        raise UserError(f"trainer: expected keys and values, such as {{max_steps: 10}}, got {flags!r}")
    for name in ("max_steps", "max_epochs"):
        if flags[name] != -1:  # no limit
            check_numbers("trainer", 1, **{name: flags[name]})
    check_numbers("trainer", 1, **{name: flags[name] for name in COUNTS})
    check_numbers("trainer", 0, **{name: flags[name] for name in NOT_NEGATIVE})
    check_numbers("trainer", -1, num_sanity_val_steps=flags["num_sanity_val_steps"])
    interval = flags["val_check_interval"]  # or a time, as text
    if isinstance(interval, int | float):
        check_numbers("trainer", 1 if isinstance(interval, int) else POSITIVE, val_check_interval=interval)
    limit = str(flags["max_time"])  # of several forms, such as 00:01:00:00, -1 day and {'minutes': 5}
    digits = {character for character in limit if character.isdigit()}
    if digits and ("-" in limit or digits == {"0"}):
        raise UserError(f"trainer.max_time must be longer than nothing, not {limit}")
    if flags["barebones"]:
        _check_barebones(command, flags)
    limit_of, done = LIMITS[command] if command else ("", "")
    if limit_of and flags[limit_of] == 0:
        raise UserError(f"trainer.{limit_of} must not be 0: nothing would be {done}")
    _check_processes(flags["accelerator"], flags["devices"])
    for key, value in _values(config, ""):
        if value != value:
            raise UserError(f"{key} must be a number, not nan")
        name = key.rpartition(".")[2].partition("[")[0]
        if name in PATHS and isinstance(value, str):
            check_path(value, key)
            if name in FOLDERS:
                check_folder(Path(value), key)


def _check_barebones(command: str | None, flags: Mapping[str, Any]) -> None:
    """Refuse what `trainer.barebones` turns off and the user turned on."""
    if command in ("validate", "test"):
        raise UserError(f"trainer.barebones turns off all measures, and {command} would give nothing: leave it out")
    for name in SLOW:
        if flags[name]:
            raise UserError(f"trainer.barebones turns off trainer.{name}: leave one of the two out")


def _check_processes(accelerator: object, devices: object) -> None:
    """Refuse far more processes than the machine has cores; each device of the accelerator `cpu` is a process."""
    most = 4 * max(os.cpu_count() or 1, 4)
    if accelerator == "cpu" and str(devices).isdecimal() and int(str(devices)) > most:
        raise UserError(f"trainer.devices must be at most {most} with the accelerator cpu here, not {devices}")


def _values(value: object, key: str) -> Iterator[tuple[str, object]]:
    """Yield the dotted name and the value of every setting that is neither a mapping nor a list."""
    if isinstance(value, list):
        for number, item in enumerate(value):
            yield from _values(item, f"{key}[{number}]")
    elif isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _values(inner, key if name == "init_args" else f"{key}.{name}".lstrip("."))
    else:
        yield key, value
