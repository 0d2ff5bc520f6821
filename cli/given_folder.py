"""A folder that the user named for a run."""

import fcntl
import os
from contextlib import suppress
from pathlib import Path
from shutil import rmtree

from cli.run_folder import check_folder
from datamodules.errors import UserError


class GivenFolder:
    """A folder that one run holds until it ends. A killed process holds nothing, because the lock is the system's.

    Args:
        folder: The folder, which is made if it does not exist.
        option: The option that names it, for messages.

    Raises:
        UserError: The folder cannot be made or written into, holds a run already, or another process holds it.
    """

    def __init__(self, folder: Path, option: str) -> None:
        check_folder(folder, option)
        self.folder = folder
        self._made = [path for path in (folder, *folder.parents) if not path.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._before = {*folder.iterdir(), *folder.rglob("*.ckpt")}
            self._lock = os.open(folder, os.O_RDONLY)
        except OSError as error:
            self._remove_made()
            raise UserError(f"{option}: cannot write into {folder}: {error.strerror}") from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self.release()
            raise UserError(f"{option}: another run writes into {folder} now, name another folder") from error
        except OSError:
            pass  # a file system without locks
        if (folder / "config.yaml").exists():
            self.release()
            raise UserError(f"{option}: {folder} already holds a run, name another folder")

    def release(self) -> None:
        """Let other runs have the folder."""
        lock, self._lock = self._lock, -1
        if lock >= 0:
            os.close(lock)

    def clear(self) -> None:
        """Remove what the run has written, unless a checkpoint is part of it, and the folder if the run made it."""
        if any(path not in self._before for path in self.folder.rglob("*.ckpt")):
            return
        for path in [path for path in self.folder.iterdir() if path not in self._before]:
            rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
        self._remove_made()

    def _remove_made(self) -> None:
        for path in self._made:
            with suppress(OSError):
                path.rmdir()
