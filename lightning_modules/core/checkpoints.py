"""Checkpoints: checks before one is used, networks read from them, and members of an ensemble written as such.

Shapes: S ensemble members.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import lightning
import torch
from torch import Tensor, nn

from datamodules.errors import UserError
from lightning_modules.core.archive import read_archive
from lightning_modules.core.ensemble import fit_state, member_state
from lightning_modules.core.files import replacing

PREFIX = "network."  # of the network's parameters in the state dict of a sequence model
AVERAGED = "current_model_state"  # the weights that are trained, in the checkpoint of a run with an average of weights
CHUNK = 2**22  # values that are checked at once
SIZE_MISMATCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((.*?)\) from checkpoint, "
    r"the shape in current model is torch\.Size\((.*?)\)"
)
OTHER_KEYS = re.compile(r"(Missing|Unexpected) key\(s\) in state_dict: \"([^\"]+)\"")


def read_checkpoint(path: str, option: str, weights_only: bool = True) -> dict[str, Any]:
    """Return the content of a checkpoint, on the CPU, mapped into memory; its parameters are under `state_dict`.

    Args:
        path: The path as the user gave it.
        option: The option that took the path, for messages.
        weights_only: Refuse a file that may run code.

    Raises:
        UserError: The file does not exist, cannot be read, is damaged, or does not hold named parameters.
    """
    content = read_archive(path, option, weights_only)
    if not isinstance(content, dict):
        kind = "a tensor" if isinstance(content, Tensor) else f"a {type(content).__name__}"
        raise UserError(f"{option}: {path} is not the checkpoint of a run, it holds {kind}")
    if "state_dict" not in content:
        bare = bool(content) and all(isinstance(value, Tensor) for value in content.values())
        hint = ": it holds parameters alone, without the rest of a checkpoint" if bare else ""
        raise UserError(f"{option}: {path} is not the checkpoint of a run, it has no 'state_dict'{hint}")
    for key in {"state_dict", AVERAGED}.intersection(content):
        if fault := _fault(content[key]):
            raise UserError(f"{option}: {path} is not the checkpoint of a run, {fault} in its '{key}'")
    return content


def _fault(state: object) -> str | None:
    """Return why an object is no state dict, or None."""
    if not isinstance(state, dict):
        return "there are no named parameters"
    for name, value in state.items():
        if not isinstance(name, str):
            return f"the name of a parameter is {name!r}"
        if isinstance(value, Tensor):
            if value.layout is not torch.strided or value.is_meta:
                return f"{name} is {'a tensor without values' if value.is_meta else 'a sparse tensor'}"
        elif not name.endswith("_extra_state"):  # whatever the module's `get_extra_state` returns
            return f"{name} is a {type(value).__name__} instead of a tensor"
    return None


def read_state(path: str, option: str) -> dict[str, Tensor]:
    """Return the state dict of another run's checkpoint, on the CPU.

    Raises:
        UserError: See `read_checkpoint`; names `option`.
    """
    return cast(dict[str, Tensor], read_checkpoint(path, option)["state_dict"])


def check_finite(content: Mapping[str, Any], option: str, path: str, members: int | None = None) -> None:
    """Refuse weights that are not finite; of an ensemble only if those of every member are not.

    Args:
        content: The content of a checkpoint.
        option: The option that took the path, for the message.
        path: The path, for the message.
        members: S of a checkpoint without a config.

    Raises:
        UserError: A weight is NaN or infinite.
    """
    ensemble = _ensemble_of(content) or members or 1
    for key in {"state_dict", AVERAGED}.intersection(content):
        finite, culprit = torch.ones(ensemble, dtype=torch.bool), ""
        for name, value in content[key].items():
            if not isinstance(value, Tensor):
                continue
            stacked = ensemble > 1 and value.dim() > 0 and len(value) == ensemble
            parts = [value[member] for member in range(ensemble)] if stacked else [value]
            finite &= torch.tensor([_is_finite(part) for part in parts])
            if not finite.any():
                culprit = name
                break
        if culprit:
            whose = f"every one of its {ensemble} members has weights that are" if ensemble > 1 else f"{culprit} is"
            raise UserError(f"{option}: the weights in {path} have diverged: {whose} not finite")


def saved_config(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config that a checkpoint was made with; empty for a checkpoint without a config of plain types."""
    config = content.get("config")
    try:
        json.dumps(config)
    except (TypeError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _ensemble_of(content: Mapping[str, Any]) -> int | None:
    """Return the number of ensemble members by a checkpoint's config; None for a checkpoint without a config."""
    config = saved_config(content)
    if not config:
        return None
    try:
        members = config["model"]["init_args"]["ensemble"]
    except (KeyError, TypeError):
        return 1  # a model that knows no ensembles
    return members if isinstance(members, int) else 1


def _is_finite(value: Tensor) -> bool:
    if not (value.is_floating_point() or value.is_complex()):
        return True
    if value.numel() * value.element_size() > value.untyped_storage().nbytes():
        value = torch.empty(0, dtype=value.dtype).set_(value.untyped_storage())  # fewer values, expanded to a shape
    flat = value.flatten()
    for start in range(0, len(flat), CHUNK):
        part = flat[start : start + CHUNK]
        values = part if part.element_size() > 1 else part.float()  # torch knows no isfinite for 8 bits
        # A buffer may hold a mask of zeros and -inf.
        if not values.isfinite().all() and not ((values == 0) | (values == -torch.inf)).all():
            return False
    return True


def load_network(path: str, network: nn.Module, members: int, option: str) -> dict[str, Tensor]:
    """Return the parameters of the network in a checkpoint; those of a single network are given to every member.

    Raises:
        UserError: The file does not exist, is damaged, or does not fit; names `option`.
    """
    state = read_state(path, option)
    parameters = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    return fit_state(parameters, network.state_dict(), members, f"{option} {path}")


def write_members(
    folder: Path, network: nn.Module, seeds: list[int], epoch: int, step: int, data: Mapping[str, Any]
) -> None:
    """Write `<seed>.ckpt` for each member of an ensemble: a checkpoint that an ordinary model of that size loads.

    Args:
        folder: The folder, made if it does not exist.
        network: The network, stacked if there are several seeds.
        seeds: One seed per member.
        epoch: The epoch that the checkpoints name.
        step: The optimizer step that the checkpoints name.
        data: The state of the data by the name of its class, such as the vocabulary of a text; empty if it has none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = network.state_dict()
    for member, seed in enumerate(seeds):
        parameters = member_state(state, member) if len(seeds) > 1 else state
        content = {"state_dict": {PREFIX + name: value.cpu() for name, value in parameters.items()}}
        versions = {"pytorch-lightning_version": lightning.__version__}
        with replacing(folder / f"{seed}.ckpt") as draft:
            torch.save({**content, "epoch": epoch, "global_step": step, **versions, **data}, draft)


def describe_mismatch(error: RuntimeError) -> str | None:
    """Return one sentence on why a state dict does not fit the configured model; None for other errors."""
    if match := SIZE_MISMATCH.search(str(error)):
        name, saved, configured = match.groups()
        return f"the checkpoint does not fit the config: {name} is {saved} there and {configured} in the model"
    if match := OTHER_KEYS.search(str(error)):
        missing = match[1] == "Missing"
        relation = "lacks the model's parameter" if missing else "has a parameter that the model does not have:"
        return f"the checkpoint does not fit the config: it {relation} {match[2]}"
    return None
