"""Checks of the checkpoints that a command names: the files before anything is built, then their fit to the model."""

import os
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
from fsspec.implementations.local import LocalFileSystem  # type: ignore[import-untyped]  # fsspec has no types
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from packaging.version import InvalidVersion, Version

from callbacks.parameter_swap import DONOR
from cli.checkpoint_fit import check_loops, misfit_of_parameters
from cli.checkpoint_optimizer import check_optimizer
from cli.checkpoint_settings import changes_of_training, class_of, made_with, setting
from cli.restoring import explained
from datamodules.errors import UserError
from lightning_modules.core.checkpoints import check_finite, load_network, read_checkpoint
from lightning_modules.core.ensemble_module import EnsembleModule
from lightning_modules.separability.anchor import ANCHOR

CKPT, START = "--ckpt_path", "model.start"
ANSWER_S = 10.0  # how long an address may take to answer
SHARDED = ("meta.pt", ".metadata", "checkpoint")  # one of them is in the folder of a sharded checkpoint
SHARDING = (
    "fsdp",
    "deepspeed",
    "modelparallel",
    "model_parallel",
)  # in the names of strategies that read such a folder
# What a resumed fit needs beside the weights
RESUMED: dict[str, type] = {"optimizer_states": list, "lr_schedulers": list, "loops": dict}
COUNTS = ("global_step", "epoch")


def check_files(command: str, config: Mapping[str, Any]) -> None:
    """Check the files that a command's config names as checkpoints, before anything is built.

    These are `--ckpt_path`, `model.start` (unless `--ckpt_path` comes before it), `model.orthogonality.anchor`, and the
    donors of `ParameterSwap`. A file is read once as a whole for its checksums; then its weights are checked in place.

    Args:
        command: The command: fit, validate, test or predict.
        config: The resolved config of the command, as plain types.

    Raises:
        UserError: A file is missing, damaged, not the checkpoint of a run, not suited to the command, or holds weights
            that are not finite. `model.on_nonfinite: continue` allows such weights to be trained on.
    """
    members = setting(config, "model.ensemble")
    members = members if isinstance(members, int) else None
    continues = setting(config, "model.on_nonfinite") == "continue"
    if config["ckpt_path"] is not None and (content := _read(config)) is not None:
        path = str(config["ckpt_path"])
        _check_keys(content, command, path, setting(config, START, absent=True))
        if not continues:
            check_finite(content, CKPT, path, members)
    for option, path in _others(config):
        content = read_checkpoint(path, option)
        if option != START or not continues:
            check_finite(content, option, path, members)


def check_fit(
    command: str, config: Mapping[str, Any], model: LightningModule, data: LightningDataModule, trainer: Trainer
) -> None:
    """Check that the checkpoints fit the model that has been built, and tell what differs from the config.

    The data takes its state already here. Lightning restores it after `setup`, which would give a text a vocabulary of
    its own.

    Args:
        command: The command.
        config: The resolved config of the command, as plain types.
        model: The model, before its weights are restored.
        data: The data, before its setup.
        trainer: The trainer, before it runs.

    Raises:
        UserError: A checkpoint is of another kind of model, of other shapes, or holds the state of another optimizer.
    """
    if isinstance(model, EnsembleModule):
        for option, path in _others(config):
            if option != DONOR:  # a donor shares some parameters with the model; `ParameterSwap` compares these
                load_network(path, model.network, model.ensemble, option)
                if option == START:
                    _warn_of_other_vocabulary(path, data)
    if config["ckpt_path"] is None:
        _warn_of_untrained_weights(command, config, model)
        return
    content = _read(config)
    if content is None:
        return
    if misfit := misfit_of_parameters(content, model):
        origin = made_with(command, content, config)
        raise UserError(f"{CKPT}: the checkpoint does not fit the config: {misfit}{origin and f'; it was {origin}'}")
    if state := content.get(type(data).__qualname__):
        with explained(config["ckpt_path"]):
            data.load_state_dict(state)
    check_loops(content, command, trainer, CKPT)
    if command == "fit":
        check_optimizer(content, model, trainer, class_of(config, "model.optimizer"), CKPT)
    sentences = [f"the checkpoint was {origin}"] if (origin := made_with(command, content, config)) else []
    if command == "fit":
        sentences += changes_of_training(content, config)
    if sentences:
        rank_zero_warn(f"{CKPT}: {'; '.join(sentences)}")


def _others(config: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return option and path of the checkpoints that a config names beside `--ckpt_path`."""
    named = [(ANCHOR, setting(config, ANCHOR))]
    if config["ckpt_path"] is None:
        named.append((START, setting(config, START)))
    callbacks = config["trainer"]["callbacks"] or []
    for callback in callbacks if isinstance(callbacks, list) else [callbacks]:
        one = {"callback": callback}
        if class_of(one, "callback") == "ParameterSwap" and setting(one, "callback.mode") != "random":
            named.append((DONOR, setting(one, "callback.donor")))
    return [(option, path) for option, path in named if isinstance(path, str)]


def _read(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the content of `--ckpt_path`; None for a sharded checkpoint or a remote file, which Lightning reads."""
    path = str(config["ckpt_path"])
    if "://" in path:
        system = _file_system(path)
        if not isinstance(system, LocalFileSystem):
            _check_that_it_answers(system, path)
            return None
        path = LocalFileSystem._strip_protocol(path)
    elif os.path.isdir(path):
        _check_sharded(path, config["trainer"]["strategy"])
        return None
    trusted = config.get("weights_only") is False
    return read_checkpoint(path, CKPT, weights_only=not trusted)


def _file_system(address: str) -> Any:
    if address.startswith(("http://", "https://")):
        # Lightning would keep the file by its last name alone and take it for every other address of that name.
        raise UserError(f"{CKPT}: {address} is a web address; download the file and name your copy of it")
    try:
        return get_filesystem(address)
    except ImportError as error:
        raise UserError(f"{CKPT}: {address} needs a package that is not installed: {error}") from error
    except Exception as error:  # every file system has its own
        raise UserError(f"{CKPT}: {address} is no address of a checkpoint: {error}") from error


def _check_that_it_answers(system: Any, address: str) -> None:
    outcome: list[str] = []

    def look() -> None:
        try:
            outcome.append("" if system.exists(address) else "there is nothing at that address")
        except Exception as error:  # every file system has its own
            outcome.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=look, daemon=True)  # a daemon does not keep the process from its end
    thread.start()
    thread.join(ANSWER_S)
    if fault := outcome[0] if outcome else f"no answer within {ANSWER_S:g} s":
        raise UserError(f"{CKPT}: {address} cannot be reached: {fault}")


def _check_sharded(path: str, strategy: object) -> None:
    if not any(Path(path, part).exists() for part in SHARDED):
        raise UserError(f"{CKPT}: {path} is a folder and not a sharded checkpoint, name a file in it")
    if not any(name in str(strategy).lower() for name in SHARDING):
        raise UserError(f"{CKPT}: {path} is a sharded checkpoint, which trainer.strategy {strategy!r} cannot read")


def _check_keys(content: Mapping[str, Any], command: str, path: str, has_no_start: bool) -> None:
    """Check the keys of Lightning's checkpoints, and for `fit` those that a resumed run needs."""
    _check_version(content, path)
    for key in ("callbacks", "loops"):
        if not isinstance(content.get(key, {}), dict):
            raise UserError(f"{CKPT}: {path} is not the checkpoint of a run, its '{key}' is no mapping")
    for key in COUNTS:
        count = content.get(key, 0)
        if type(count) is not int or count < 0:
            raise UserError(f"{CKPT}: {path} is not the checkpoint of a run, its '{key}' is {count!r}")
    if command != "fit":
        return
    if "optimizer_states" not in content:
        advice = "" if has_no_start else "; to start from these weights, set model.start"
        raise UserError(f"{CKPT}: {path} holds weights only, and fit resumes from a whole checkpoint{advice}")
    for key, kind in RESUMED.items():
        if not isinstance(content.get(key), kind):
            raise UserError(f"{CKPT}: {path} is not the whole checkpoint of a run, it has no {kind.__name__} '{key}'")
    for key in COUNTS:
        if key not in content:
            raise UserError(f"{CKPT}: {path} is not the whole checkpoint of a run, it has no '{key}'")


def _check_version(content: Mapping[str, Any], path: str) -> None:
    written = content.get("pytorch-lightning_version")
    if written is None:
        raise UserError(f"{CKPT}: {path} is not the checkpoint of a run, it has no 'pytorch-lightning_version'")
    try:
        newer = Version(written).release[:2] > Version(lightning.__version__).release[:2]
    except (InvalidVersion, TypeError) as error:
        raise UserError(f"{CKPT}: {path} is of a Lightning without a version: {written!r}") from error
    if newer:
        advice = f"this is Lightning {lightning.__version__}: install that version"
        raise UserError(f"{CKPT}: {path} was written by Lightning {written}, and {advice}")


def _warn_of_other_vocabulary(path: str, data: LightningDataModule) -> None:
    """Tell that the tokens of `model.start` stand for other characters than those of the data."""
    known = read_checkpoint(path, START).get(type(data).__qualname__)
    if known and known != data.state_dict():
        told = "was trained with another vocabulary than this text has, so its tokens are other characters"
        rank_zero_warn(f"{START}: {path} {told}; data.level byte has one vocabulary for all texts")


def _warn_of_untrained_weights(command: str, config: Mapping[str, Any], model: LightningModule) -> None:
    """Tell that the weights are random, unless they come from elsewhere or there are none to train."""
    elsewhere = any(setting(config, f"model.{name}") for name in ("start", "pretrained"))
    trained = any(parameter.requires_grad for parameter in model.parameters())
    if command != "fit" and trained and not elsewhere and not config["trainer"]["fast_dev_run"]:
        rank_zero_warn(f"{command} without {CKPT}: the weights of {type(model).__name__} are untrained")
