"""The folder of a run, and checks of the folders and files that the user names."""

import hashlib
import os
from contextlib import suppress
from datetime import datetime
from pathlib import Path
from shutil import rmtree
from tempfile import TemporaryFile

from datamodules.errors import UserError


def make_run_dir(config_file: str | None, resolved: str, parent: str = "runs") -> Path:
    """Make `<parent>/<config name>/<YYYYmmdd-HHMMSS>-<hash>/`, with a counter if that folder exists already.

    Args:
        config_file: The config's path, which gives the name; None gives `adhoc`. The `config.yaml` in a run's folder
            gives the name of the config that the run was started with.
        resolved: The resolved config; the folder's name holds the first digits of its hash.
        parent: The folder of all runs, relative to the working directory.

    Raises:
        UserError: The folder cannot be made.
    """
    file = Path(config_file or "adhoc")
    rerun = file.name == "config.yaml" and (file.parent / "results.json").exists()
    digest = hashlib.sha256(resolved.encode()).hexdigest()[:6]
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{digest}"
    family = Path(parent, file.resolve().parent.parent.name if rerun else file.stem)
    folder, copies = family / name, 1
    while True:
        try:
            family.mkdir(parents=True, exist_ok=True)
            folder.mkdir()  # atomic, so that parallel runs never share a folder
            return folder
        except FileExistsError as error:
            if not family.is_dir():  # it is a file, or a link that leads nowhere
                raise UserError(f"cannot make a folder for the run: {family} is not a folder") from error
            copies += 1
            folder = family / f"{name}-{copies}"
        except OSError as error:
            raise UserError(f"cannot make a folder for the run: {error.strerror}: {error.filename}") from error


def tidy_run_dir(folder: Path, failed: bool) -> None:
    """Remove the folder of a run if it is empty, or if the run failed and has no checkpoint.

    Args:
        folder: A folder of `make_run_dir`.
        failed: Whether the run ended before it trained.
    """
    if not any(folder.iterdir()) or (failed and not any(folder.rglob("*.ckpt"))):
        rmtree(folder)
        for parent in folder.parents[:2]:  # `runs/<config>` and `runs`, if no run is in them
            with suppress(OSError):
                parent.rmdir()


def check_folder(folder: Path, option: str) -> None:
    """Check that files can be written into a folder, which may not exist yet.

    Args:
        folder: The folder.
        option: The option that names it, for the message.

    Raises:
        UserError: The folder cannot be made, or nothing can be written into it.
    """
    # `Path.exists` raises an error where a folder cannot be entered
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    if not existing.is_dir():
        raise UserError(f"{option}: cannot make the folder {folder}, for {existing} is a file")
    if not os.access(existing, os.W_OK):
        raise UserError(f"{option}: no permission to write into {existing}")
    try:
        with TemporaryFile(dir=existing):
            pass
    except OSError as error:  # the file system may take no files
        raise UserError(f"{option}: cannot write into {existing}: {error.strerror}") from error
