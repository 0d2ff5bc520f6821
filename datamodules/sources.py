"""Files and hub data sets that the user named: what goes wrong while they are read becomes a UserError."""

import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datamodules.errors import UserError
from datamodules.hub import offline_without_hub, reason_of

ADDRESS = re.compile(r"[A-Za-z][\w+.-]*:/+")
# First bytes of files whose content is compressed
PACKED = {b"PK\3\4": "zip", b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
SPREADSHEETS = (".xlsx", ".ods")  # are zip files
WIDE = (b"\xff\xfe", b"\xfe\xff")  # first bytes of texts in UTF-16 and UTF-32
VARIABLE = re.compile(r"\$\w|\$\{|%\w+%")


def is_broken(text: str) -> bool:
    """Return whether a text holds half of a surrogate pair, which no file and no tokenizer takes."""
    return not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text)


def check_path(path: str | Path, key: str) -> None:
    """Check that a text names a file or folder of this machine, which may not exist yet.

    Args:
        path: The text.
        key: The setting that holds it, such as `data.path`.

    Raises:
        UserError: The text is empty, an address, holds what only a shell expands, or cannot be a path.
    """
    text = str(path)
    if not text.strip():
        raise UserError(f"{key}: the path is empty")
    if "\0" in text or is_broken(text):
        raise UserError(f"{key}: {text!a} holds a character that no path has")
    if os.path.lexists(text):
        return
    if ADDRESS.match(text):
        raise UserError(f"{key}: {text} is an address, and a path on this machine is needed")
    if text.startswith("~") or VARIABLE.search(text):
        expanded = os.path.expanduser(os.path.expandvars(text))
        advice = f"write {expanded}" if expanded != text else "write the whole path"
        raise UserError(f"{key}: '{text}' is not expanded in a config, {advice}")
    longest = max(len(os.fsencode(part)) for part in Path(text).parts)
    if longest > 255 or len(os.fsencode(os.path.abspath(text))) > 4095:
        raise UserError(f"{key}: {_shortened(text)} is too long for a path")


@contextmanager
def reading(path: str | Path, key: str) -> Iterator[None]:
    """Check a file before it is read, and translate what the operating system raises while it is opened and read.

    Args:
        path: The file.
        key: The setting that names the file, such as `data.path`.

    Raises:
        UserError: The file is missing, is not a regular file, or cannot be read.
    """
    check_path(path, key)
    try:
        # Opening a pipe without a writer would wait for ever
        if not stat.S_ISREG(mode := os.stat(path).st_mode):
            kind = "a folder" if stat.S_ISDIR(mode) else "not a regular file"
            raise UserError(f"{key}: cannot read '{path}': it is {kind}")
        yield
    except FileNotFoundError as error:
        raise UserError(f"no data file at '{path}' ({key})") from error
    except OSError as error:
        raise UserError(f"{key}: cannot read '{path}': {error.strerror or error}") from error


def check_start(path: str | Path, key: str, as_bytes: bool = False) -> None:
    """Check by the first bytes of a file that it can be read as a text in UTF-8.

    Args:
        path: The file.
        key: The setting that names the file.
        as_bytes: Whether any encoding will do.

    Raises:
        UserError: The file is compressed, or a text in UTF-16 or UTF-32.
    """
    with open(path, "rb") as file:
        start = file.read(max(map(len, PACKED)))
    for magic, kind in PACKED.items():
        if start.startswith(magic):
            advice = "save it as .csv" if Path(path).suffix.lower() in SPREADSHEETS else "unpack it first"
            raise UserError(f"'{path}' ({key}) is compressed ({kind}): {advice}")
    if start.startswith(WIDE) and not as_bytes:
        raise UserError(f"'{path}' ({key}) is a text in UTF-16 or UTF-32: save it in UTF-8")


def hub_rows(
    name: str, *config: str, split: str, streaming: bool = False, local_source: str
) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of a data set on the Hugging Face hub, or of its copy in the cache.

    Args:
        name: The data set's name on the hub, the user's `data.path`.
        *config: The configuration of the data set, where it has several.
        split: The part of the data set.
        streaming: Download rows as they are needed.
        local_source: The value of `data.source` that reads a local file instead, for the error message.

    Raises:
        UserError: The data set does not exist, has another form, or cannot be reached.
    """
    # The import takes seconds, and no other source needs it
    from datasets import load_dataset  # type: ignore[import-untyped]  # the library has no type information
    from datasets.exceptions import DatasetGenerationError, DatasetsError  # type: ignore[import-untyped]  # likewise

    try:
        with offline_without_hub():
            yield from load_dataset(name, *config, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        # RuntimeError: a data set that is a script. A DatasetGenerationError does not name the reason, its cause does
        reason = error.__cause__ or error if isinstance(error, DatasetGenerationError) else error
        sentence = reason_of(reason, name) or " ".join(str(reason).split()).rstrip(".")
        raise UserError(
            f"data.path: cannot read '{name}' from the Hugging Face hub: {sentence}; "
            f"data.source '{local_source}' reads a local file"
        ) from error


def _shortened(text: str) -> str:
    return text if len(text) < 80 else f"{text[:40]}...{text[-20:]}"
