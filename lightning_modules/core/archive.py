"""Files of checkpoints: what a path names, whether the archive is whole, and reading it without running code."""

import difflib
import errno
import os
import stat
import struct
import zipfile
import zlib
from pathlib import Path
from pickle import UnpicklingError
from typing import BinaryIO, NoReturn

import torch

from datamodules.errors import UserError

NO_ARCHIVE = (  # what zipfile raises for an archive with wrong bytes
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    EOFError,
    OSError,
    OverflowError,
    RuntimeError,
    ValueError,
)
NOT_FILES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
MAY_RUN_CODE = ("GLOBAL ", "Trying to ", "Can only ", "Unsupported operand")  # in torch's messages
ZIP = b"PK\3\4"  # the beginning of an archive
ZIP_END = b"PK\5\6"  # the beginning of its last record
LONGEST_END = 22 + 2**16  # bytes of that record
NO_CHECKPOINT = "is no checkpoint: it is"
DAMAGED = "is damaged or was not written to its end; "

_whole: set[tuple[int, ...]] = set()  # files whose checksums this process has compared already


def is_intact(path: Path) -> bool:
    """Return whether a file is a complete torch archive: it has every member, each with the right checksum."""
    try:
        if not path.is_file():
            return False  # opening a pipe would wait for a writer
        with zipfile.ZipFile(path) as archive:
            return _pickle_name(archive) is not None and archive.testzip() is None
    except NO_ARCHIVE:
        return False


def read_archive(path: str, option: str, weights_only: bool = True) -> object:
    """Return what torch saved in a file, with its tensors mapped into memory rather than read.

    The checksums are compared once in a process for a file, which reads the file once from its beginning to its end.

    Args:
        path: The path as the user gave it.
        option: The option that took the path, for messages.
        weights_only: Refuse a file that may run code.

    Raises:
        UserError: The path names no file, the file cannot be read or is damaged, torch did not write it, or it may run
            code. The message of a damaged file names the newest intact checkpoint beside it. The user decides whether
            to use that one, since it changes what is measured.
    """
    file = find_file(path, option)
    try:
        with open(file, "rb") as stream:
            fault = _fault(stream)
    except PermissionError as error:
        raise UserError(f"{option}: no permission to read {path}") from error
    except OSError as error:
        raise UserError(f"{option}: {path} cannot be read: {error.strerror}") from error
    if fault:
        raise UserError(f"{option}: {path} {fault}{_intact_sibling(file) if fault is DAMAGED else ''}")
    try:
        return torch.load(file, map_location="cpu", mmap=True, weights_only=weights_only)
    except Exception as error:  # a pickle can raise anything
        _explain(error, path, option, weights_only)


def find_file(path: str, option: str) -> Path:
    """Return the path of an ordinary file that exists.

    Raises:
        UserError: The path is blank, nothing is there, or what is there is not a file.
    """
    if not path.strip():
        raise UserError(f"{option}: expected the path of a checkpoint, got {path!r}")
    # To Lightning `last` and `best` mean files of the same run, and a run that begins has none.
    advice = ": name a file, as in runs/X/.../checkpoints/last.ckpt" if path in {"last", "best", "hpc"} else ""
    try:
        mode = os.stat(path).st_mode
    except PermissionError as error:
        raise UserError(f"{option}: no permission to read {path}") from error
    except (OSError, ValueError) as error:  # a ValueError for a null byte
        if getattr(error, "errno", None) == errno.ELOOP:
            raise UserError(f"{option}: {path} is a link that leads back to itself") from error
        if not isinstance(error, FileNotFoundError | NotADirectoryError):
            raise UserError(f"{option}: {path!r} cannot be a file: {getattr(error, 'strerror', error)}") from error
        if os.path.islink(path):
            raise UserError(f"{option}: {path} is a link to {os.readlink(path)}, which does not exist") from error
        raise UserError(f"{option}: there is no file {path}{advice or nearest_file(path)}") from error
    if kind := NOT_FILES.get(stat.S_IFMT(mode)):
        raise UserError(f"{option}: {path} is {kind}, name a checkpoint file")
    return Path(path)


def nearest_file(path: str) -> str:
    """Return `; did you mean X?` with the most similar name in the same folder, or an empty string."""
    folder, name = os.path.split(os.path.relpath(path))
    readable = os.path.isdir(folder or ".") and os.access(folder or ".", os.R_OK)
    siblings = os.listdir(folder or ".") if readable else []
    stem, suffix = os.path.splitext(name)  # without the suffix, which would make all names similar
    stems = [os.path.splitext(file)[0] for file in siblings if file.endswith(suffix)]
    close = difflib.get_close_matches(stem, stems, 1)
    return f"; did you mean {os.path.join(folder, close[0] + suffix)}?" if close else ""


def _fault(stream: BinaryIO) -> str | None:
    """Return what is wrong with a file as an archive of torch, or None."""
    status = os.fstat(stream.fileno())
    key = status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
    if key in _whole:
        return None
    try:
        archive = zipfile.ZipFile(stream)
    except NO_ARCHIVE:
        stream.seek(-min(status.st_size, LONGEST_END), os.SEEK_END)
        has_end = ZIP_END in stream.read()
        stream.seek(0)
        return DAMAGED if has_end else _fault_of_other_file(stream.read(16))
    if _pickle_name(archive) is None:
        return f"{NO_CHECKPOINT} a zip archive that torch.save did not write"
    try:
        whole = archive.testzip() is None
    except NO_ARCHIVE:
        whole = False
    if not whole:
        return DAMAGED
    _whole.add(key)
    return None


def _fault_of_other_file(head: bytes) -> str:
    if not head:
        return f"{NO_CHECKPOINT} empty"
    if head.startswith(ZIP[: len(head)]):
        return DAMAGED
    if head.startswith(b"\x80"):
        return f"{NO_CHECKPOINT} a pickle, or has torch's format from before version 1.6, which has no checksums"
    if head[8:9] == b"{":
        return f"{NO_CHECKPOINT} a safetensors file, which holds weights alone"
    return f"{NO_CHECKPOINT} a file of another kind"


def _pickle_name(archive: zipfile.ZipFile) -> str | None:
    """Return the name of the pickle in an archive that `torch.save` wrote; None in other archives."""
    members = archive.infolist()
    # `torch.save` compresses nothing, and a file that is mapped into memory cannot be decompressed.
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        return None
    names = [member.filename for member in members]
    pickles = [name for name in names if name.endswith("/data.pkl") and name.count("/") == 1]
    is_program = any(name.endswith("/constants.pkl") for name in names)  # TorchScript
    return pickles[0] if len(pickles) == 1 and not is_program else None


def _intact_sibling(file: Path) -> str:
    siblings = [other for other in file.parent.glob("*.ckpt") if other != file and other.is_file()]
    newest_first = sorted(siblings, key=lambda other: other.stat().st_mtime, reverse=True)
    intact = next(filter(is_intact, newest_first), None)
    return f"the newest intact one beside it is {intact}" if intact else f"{file.parent} holds no intact one"


def _explain(error: Exception, path: str, option: str, weights_only: bool) -> NoReturn:
    message = str(error)
    if weights_only and isinstance(error, UnpicklingError) and any(part in message for part in MAY_RUN_CODE):
        # Only --ckpt_path has a flag with which the user says that it may.
        advice = ": if you trust it, add --weights_only false" if option == "--ckpt_path" else ""
        raise UserError(f"{option}: {path} holds more than plain data and may run code{advice}") from error
    raise UserError(f"{option}: {path} cannot be read as a checkpoint ({type(error).__name__})") from error
