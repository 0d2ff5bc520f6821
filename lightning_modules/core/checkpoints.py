"""Checks of a checkpoint before it is used, so that a damaged or unfitting one is refused in words."""

import difflib
import os
import re
import zipfile
import zlib
from pathlib import Path

import torch
from torch import Tensor

from datamodules.errors import UserError

SIZE_MISMATCH = re.compile(
    r"size mismatch for (\S+): copying a param with shape torch\.Size\((.*?)\) from checkpoint, "
    r"the shape in current model is torch\.Size\((.*?)\)"
)
OTHER_KEYS = re.compile(r"(Missing|Unexpected) key\(s\) in state_dict: \"([^\"]+)\"")


def is_intact(path: Path) -> bool:
    """Whether a file is a complete torch archive: every member is there and has its checksum."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.testzip() is None
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError):
        return False


def check_checkpoint(path: str, option: str = "--ckpt_path") -> None:
    """Refuses a checkpoint that cannot be read whole, before anything else is started.

    Folders (sharded checkpoints) and addresses such as `s3://...` are left to Lightning.

    Args:
        path: What the user gave.
        option: As what, for the message.

    Raises:
        UserError: If there is no such file.
        UserError: If the file is damaged; names the newest intact checkpoint beside it. Falling back to it is the
            user's decision, since it changes what is measured.
    """
    file = Path(path)
    if "://" in path or file.is_dir():
        return
    if not file.is_file():
        # `last` and `best` mean files of this run to Lightning, and a run that begins has none.
        advice = ": name one, as in runs/X/.../checkpoints/last.ckpt" if path in {"last", "best", "hpc"} else ""
        raise UserError(f"{option}: there is no file {path}{advice or nearest_file(path)}")
    if is_intact(file):
        return
    siblings = sorted(file.parent.glob("*.ckpt"), key=lambda other: other.stat().st_mtime, reverse=True)
    intact = next((other for other in siblings if other != file and is_intact(other)), None)
    advice = f"the newest intact one beside it is {intact}" if intact else f"{file.parent} holds no intact one"
    raise UserError(f"{option}: {path} is damaged or was not written to its end; {advice}")


def read_state(path: str, option: str) -> dict[str, Tensor]:
    """The state dict of another run's checkpoint, on the CPU.

    Raises:
        UserError: There is no such file.
        UserError: It is damaged, is not one file, or has no state dict; names `option`.
    """
    check_checkpoint(path, option)
    if not Path(path).is_file():
        raise UserError(f"{option}: {path} is not one checkpoint file")
    held = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(held, dict) or not isinstance(held.get("state_dict"), dict):
        raise UserError(f"{option}: {path} is no checkpoint of a run, it has no 'state_dict'")
    return held["state_dict"]


def nearest_file(path: str) -> str:
    """`; did you mean X?` for the most similar name in the same folder, or nothing."""
    folder, name = os.path.split(os.path.relpath(path))
    siblings = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    stem, suffix = os.path.splitext(name)  # the suffix is common to all and would make all of them similar
    stems = [os.path.splitext(file)[0] for file in siblings if file.endswith(suffix)]
    close = difflib.get_close_matches(stem, stems, 1)
    return f"; did you mean {os.path.join(folder, close[0] + suffix)}?" if close else ""


def describe_mismatch(error: RuntimeError) -> str | None:
    """Says in one sentence why a state dict does not fit the configured model; None for other errors."""
    if match := SIZE_MISMATCH.search(str(error)):
        name, saved, configured = match.groups()
        return f"the checkpoint does not fit the config: {name} is {saved} there and {configured} in the model"
    if match := OTHER_KEYS.search(str(error)):
        missing = match[1] == "Missing"
        relation = "lacks the model's parameter" if missing else "has a parameter that the model has not:"
        return f"the checkpoint does not fit the config: it {relation} {match[2]}"
    return None
