"""Checkpoints: checks before one is used, networks read from them, and members of an ensemble written as such.

Shapes: S ensemble members.
"""

import difflib
import os
import re
import zipfile
import zlib
from pathlib import Path
from typing import cast

import lightning
import torch
from torch import Tensor, nn

from datamodules.errors import UserError
from lightning_modules.core.ensemble import fit_state, member_state

PREFIX = "network."  # of the network's parameters in the state dict of a sequence model
SIZE_MISMATCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((.*?)\) from checkpoint, "
    r"the shape in current model is torch\.Size\((.*?)\)"
)
OTHER_KEYS = re.compile(r"(Missing|Unexpected) key\(s\) in state_dict: \"([^\"]+)\"")


def is_intact(path: Path) -> bool:
    """Return whether a file is a complete torch archive: it has every member, each with the right checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError):
        return False


def check_checkpoint(path: str, option: str = "--ckpt_path") -> None:
    """Refuse a checkpoint that cannot be read whole, before anything else starts.

    Folders (sharded checkpoints) and addresses such as `s3://...` are left to Lightning.

    Args:
        path: The path as the user gave it.
        option: The option that took the path, for the message.

    Raises:
        UserError: The file does not exist or is damaged. The message names the newest intact checkpoint beside it. The
            user decides whether to use that one, since it changes what is measured.
    """
    file = Path(path)
    if "://" in path or file.is_dir():
        return
    if not file.is_file():
        # To Lightning `last` and `best` mean files of the same run, and a run that begins has none.
        advice = ": name a file, as in runs/X/.../checkpoints/last.ckpt" if path in {"last", "best", "hpc"} else ""
        raise UserError(f"{option}: there is no file {path}{advice or nearest_file(path)}")
    if is_intact(file):
        return
    siblings = sorted(file.parent.glob("*.ckpt"), key=lambda other: other.stat().st_mtime, reverse=True)
    intact = next((other for other in siblings if other != file and is_intact(other)), None)
    advice = f"the newest intact one beside it is {intact}" if intact else f"{file.parent} holds no intact one"
    raise UserError(f"{option}: {path} is damaged or was not written to its end; {advice}")


def read_state(path: str, option: str) -> dict[str, Tensor]:
    """Return the state dict of another run's checkpoint, on the CPU.

    Raises:
        UserError: The file does not exist, is damaged, is not one file, or has no state dict; names `option`.
    """
    check_checkpoint(path, option)
    if not Path(path).is_file():
        raise UserError(f"{option}: {path} is not one checkpoint file")
    content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(content, dict) or not isinstance(content.get("state_dict"), dict):
        raise UserError(f"{option}: {path} is not the checkpoint of a run, it has no 'state_dict'")
    return cast(dict[str, Tensor], content["state_dict"])


def load_network(path: str, network: nn.Module, members: int, option: str) -> dict[str, Tensor]:
    """Return the parameters of the network in a checkpoint; those of a single network are given to every member.

    Raises:
        UserError: The file does not exist, is damaged, or does not fit; names `option`.
    """
    state = read_state(path, option)
    parameters = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    return fit_state(parameters, network.state_dict(), members, f"{option} {path}")


def write_members(folder: Path, network: nn.Module, seeds: list[int], epoch: int, step: int) -> None:
    """Write `<seed>.ckpt` for each member of an ensemble: a checkpoint that an ordinary model of that size loads.

    Args:
        folder: The folder, made if it does not exist.
        network: The network, stacked if there are several seeds.
        seeds: One seed per member.
        epoch: The epoch that the checkpoints name.
        step: The optimizer step that the checkpoints name.
    """
    folder.mkdir(parents=True, exist_ok=True)
    state = network.state_dict()
    for member, seed in enumerate(seeds):
        parameters = member_state(state, member) if len(seeds) > 1 else state
        content = {"state_dict": {PREFIX + name: value.cpu() for name, value in parameters.items()}}
        versions = {"pytorch-lightning_version": lightning.__version__}
        torch.save(content | {"epoch": epoch, "global_step": step} | versions, folder / f"{seed}.ckpt")


def nearest_file(path: str) -> str:
    """Return `; did you mean X?` with the most similar name in the same folder, or an empty string."""
    folder, name = os.path.split(os.path.relpath(path))
    siblings = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    stem, suffix = os.path.splitext(name)  # without the suffix, which would make all names similar
    stems = [os.path.splitext(file)[0] for file in siblings if file.endswith(suffix)]
    close = difflib.get_close_matches(stem, stems, 1)
    return f"; did you mean {os.path.join(folder, close[0] + suffix)}?" if close else ""


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
