"""The files that runs leave for other runs: whether they are whole, and what they hold; imports torch only for that."""

import hashlib
import os
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

LAST = Path("checkpoints", "last.ckpt")
RESUMED = {"state_dict", "optimizer_states", "global_step"}  # keys without which a run cannot continue


class Saved(NamedTuple):
    """A checkpoint from which a run can continue.

    Attributes:
        step: The optimizer step at which it was saved.
        path: The file, or the folder of a sharded checkpoint.
    """

    step: int
    path: Path


def newest(folder: Path) -> Saved | None:
    """Return `last.ckpt` of a run if it is whole, else the newest whole checkpoint beside it; None if there is none."""
    last = folder / LAST
    if (step := saved_step(last)) is not None:
        return Saved(step, last)
    others = [Saved(step, path) for path in found(folder) if (step := saved_step(path)) is not None]
    return max(others, key=lambda saved: (saved.step, saved.path.stat().st_mtime), default=None)


def found(folder: Path) -> list[Path]:
    """Return every checkpoint in a run's folder, whole or not."""
    return sorted((folder / LAST).parent.rglob("*.ckpt"))


def saved_step(path: Path) -> int | None:
    """Return the step of a checkpoint; None if the file is missing, is damaged, or no run can continue from it."""
    # FSDP and DeepSpeed write a folder of shards, and beside them a file with everything but the tensors
    file, keys = (path / "meta.pt", {"global_step"}) if path.is_dir() else (path, RESUMED)
    return _step(file, frozenset(keys), *_stamp(file)) if file.is_file() else None


def is_whole(path: Path) -> bool:
    """Return whether a file or folder that another run needs is there and undamaged."""
    if path.suffix == ".ckpt":
        return saved_step(path) is not None
    if path.suffix == ".safetensors":
        return path.is_file() and _is_safetensors(path, *_stamp(path))
    return path.exists()


def fingerprint(path: Path) -> str | None:
    """Return the SHA-256 of a file, or of all files in a folder with their names; None if there is neither."""
    if path.is_file():
        return _sha256(path, *_stamp(path))
    if not path.is_dir():
        return None
    files = sorted(file for file in path.rglob("*") if file.is_file())
    lines = "".join(f"{file.relative_to(path)} {fingerprint(file)}\n" for file in files)
    return hashlib.sha256(lines.encode()).hexdigest()


def _stamp(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file is replaced, so that unchanged files are read once."""
    status = path.stat()
    return status.st_mtime_ns, status.st_size, status.st_ino


@lru_cache(maxsize=4096)
def _sha256(path: Path, *stamp: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@lru_cache(maxsize=4096)
def _is_safetensors(path: Path, *stamp: int) -> bool:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(os.fspath(path), framework="numpy"):
            return True
    except (SafetensorError, OSError):
        return False


@lru_cache(maxsize=4096)
def _step(file: Path, keys: frozenset[str], *stamp: int) -> int | None:
    from datamodules.errors import UserError
    from lightning_modules.core.archive import read_archive

    try:
        content = read_archive(str(file), "checkpoint")
    except UserError:
        return None
    if not isinstance(content, dict) or not keys <= content.keys():
        return None
    step = content["global_step"]
    return step if isinstance(step, int) else None
