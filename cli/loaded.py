"""A trained module from a file alone: the checkpoint of a run, or a bridge that `export` wrote."""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.utilities import rank_zero_warn

from cli import renames
from cli.app import RunParser
from cli.checkpoint_fit import misfit_of_parameters
from cli.checkpoint_settings import made_with, setting
from cli.device import device_of_run
from cli.resolver import Resolver
from cli.trainer import build
from datamodules.errors import UserError
from lightning_modules.core.checkpoints import check_finite, read_checkpoint, saved_config
from lightning_modules.core.contracts import SupportsQuestions
from lightning_modules.pretrained.loading_device import loading_to
from lightning_modules.telepathy.export import read_exported, restore
from lightning_modules.telepathy.module import Telepathy

CKPT = "--ckpt_path"


def load(path: str, configs: Sequence[str] | None) -> tuple[LightningModule, Any]:
    """Return a model with its trained weights in eval mode, and its data; None for the data of an exported bridge.

    Models of language models are on the first GPU, if there is one.

    Args:
        path: The file.
        configs: Config files in the place of a checkpoint's config, or over that of an exported bridge.

    Raises:
        UserError: The file cannot be used.
    """
    if path.endswith(".safetensors"):
        exported = read_exported(path, CKPT)
        bridge, _ = _build(_overlaid({"model": exported.about["config"]}, configs or []))
        if not isinstance(bridge, Telepathy):
            raise UserError(f"{CKPT}: {path} holds no bridge")
        restore(bridge, exported, CKPT)
        return _ready(bridge), None
    return trained(*checkpoint(path, configs))


def trained(content: dict[str, Any], config: dict[str, Any]) -> tuple[LightningModule, Any]:
    """Return model and data of a checkpoint, as `load` does.

    Args:
        content: The content of the checkpoint.
        config: Its config.

    Raises:
        UserError: The checkpoint does not fit the config.
    """
    model, data = _build(config)
    if misfit := misfit_of_parameters(content, model):
        raise UserError(f"{CKPT}: the checkpoint does not fit the config: {misfit}")
    model.load_state_dict(content["state_dict"])
    if state := content.get(type(data).__qualname__):
        data.load_state_dict(state)
    return _ready(model), data


def checkpoint(path: str, configs: Sequence[str] | None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of a checkpoint and its config, or that of config files.

    Raises:
        UserError: It is damaged, has diverged, or holds no config.
    """
    content = read_checkpoint(path, CKPT)
    check_finite(content, CKPT, path)
    config = saved = saved_config(content)
    if configs:
        config = _resolved(configs)
        if origin := made_with("predict", content, config):
            rank_zero_warn(f"{CKPT}: the checkpoint was {origin}")
        if not saved and setting(config, "model.ensemble"):
            config["model"]["init_args"]["ensemble"] = 1  # members/<seed>.ckpt, whose run has several members
    if not {"model", "data"} <= config.keys():
        raise UserError(f"{CKPT}: {path} holds no config of a run: name it with --config")
    return content, config


def _resolved(files: Sequence[str]) -> dict[str, Any]:
    """Return the config of files, the later over the earlier ones."""
    return Resolver(["predict", *(text for file in files for text in ("--config", file))]).resolved


def _overlaid(config: dict[str, Any], files: Sequence[str]) -> dict[str, Any]:
    """Return a config with those of files over it."""
    if not files:
        return config
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "exported.yaml"
        base.write_text(yaml.safe_dump(config | {"data": "WordProblems"}))  # a config of a run names its data
        return {"model": _resolved([str(base), *files])["model"]}


def _build(config: Mapping[str, Any]) -> tuple[LightningModule, Any]:
    """Return the model and the data of a resolved config."""
    kinds: dict[str, type[LightningModule] | type[LightningDataModule]]
    kinds = {"model": LightningModule, "data": LightningDataModule}
    parser = RunParser(prog="main.py generate")
    for key in kinds.keys() & config.keys():
        parser.add_lightning_class_args(kinds[key], key, subclass_mode=True)
    parser.add_instantiator(build, object)
    parsed = parser.parse_object({key: renames.renamed(config[key]) for key in kinds.keys() & config.keys()})
    with loading_to(_device()):
        built = parser.instantiate_classes(parsed)
    return built.model, built.get("data")


def _ready(model: LightningModule) -> LightningModule:
    return (model.to(_device()) if isinstance(model, SupportsQuestions) else model).eval()


def _device() -> torch.device:
    flags = Namespace(accelerator="auto", strategy="auto", devices=1)  # type: ignore[no-untyped-call]  # of jsonargparse
    return device_of_run(flags)
