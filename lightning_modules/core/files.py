"""Files that are replaced as a whole."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory

NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}  # of file systems without hard links
UNSUPPORTED = {errno.EOPNOTSUPP, errno.EISDIR, errno.ENOENT, errno.EINVAL}  # of file systems without unnamed files


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Give a path for the block to write to; then flush that file and put it in the place of `path`.

    A reader finds the old file or the new one, never half of a file, also after a loss of power. The new file lies in
    the folder of `path` from the start. On Linux it has no name before it is whole, so a process that is killed leaves
    no part of a file behind.

    Args:
        path: The file to replace or to make. Its folder is made if it does not exist.

    Yields:
        The path to write to. It has no suffix that a library could take the format from.

    Raises:
        OSError: The file cannot be written; it names `path`, which is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    unnamed = _open_unnamed(path.parent)
    try:
        yield draft if unnamed is None else Path(f"/proc/self/fd/{unnamed}")
        if unnamed is None:
            with open(draft, "rb+") as file:
                os.fsync(file.fileno())
        else:
            os.fsync(unnamed)
            draft.unlink(missing_ok=True)  # of a process with this number that was killed between the next two lines
            # With a folder's descriptor, `os.link` follows the symbolic link in /proc to the unnamed file
            os.link(f"/proc/self/fd/{unnamed}", draft, src_dir_fd=unnamed, follow_symlinks=True)
        draft.replace(path)
        _flush_folder(path.parent)
    except OSError as error:
        draft.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error  # the name of the file is part of the reason
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
    finally:
        if unnamed is not None:
            os.close(unnamed)


def keep_as(path: Path, kept: Path) -> None:
    """Give a file a second name, in the place of any file with that name; `path` exists at every moment.

    Where the file system has no hard links, the file is moved instead.
    """
    draft = kept.with_name(f".{kept.name}.{os.getpid()}.tmp")
    try:
        draft.unlink(missing_ok=True)
        os.link(path, draft)
        draft.replace(kept)
        draft.unlink(missing_ok=True)  # a rename does nothing if both are names of the same file
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        path.replace(kept)


@contextmanager
def replacing_files(folder: Path) -> Iterator[Path]:
    """Give an empty folder for the block to write to; then put each of its files in the place of that in `folder`."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent) as draft:
        yield Path(draft)
        folder.mkdir(exist_ok=True)
        for file in sorted(Path(draft).iterdir()):
            file.replace(folder / file.name)


def _open_unnamed(folder: Path) -> int | None:
    """Open a file without a name in a folder; None where the system or the file system has none."""
    if not hasattr(os, "O_TMPFILE"):
        return None
    try:
        return os.open(folder, os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return None
        raise


def _flush_folder(folder: Path) -> None:
    """Make a rename durable; some file systems cannot flush a folder and need not."""
    with suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
