"""Texts from Python's own help pages, from a file, or from the Hugging Face hub."""

from collections.abc import Iterator
from typing import Literal

from datamodules.errors import UserError
from datamodules.sources import check_start, hub_rows, reading

Source = Literal["docs", "file", "hub"]


def read_text(source: Source, path: str, column: str, size: int | None, as_bytes: bool) -> str | bytes:
    """Return a text, or the bytes of a text.

    Args:
        source: `docs`, `file` or `hub`.
        path: The file, or the name of the data set; unused for `docs`.
        column: The column of the data set with the texts.
        size: Characters or bytes to take from the start; None for all.
        as_bytes: Return bytes.

    Raises:
        UserError: There is no text, or it cannot be read; names `data.path`.
    """
    text: str | bytes
    match source:
        case "docs":
            from pydoc_data.topics import topics  # half a megabyte that only this source needs

            text = "\n".join(topics[name] for name in sorted(topics))
        case "file":
            text = _read_file(path, size, as_bytes)
        case "hub":
            text = "\n\n".join(_hub_texts(path, column, size))
    if as_bytes and isinstance(text, str):
        text = text.encode()
    text = text[:size]
    _check(text, path)
    return text


def _check(text: str | bytes, path: str) -> None:
    if not text:
        raise UserError(f"'{path}' (data.path) is empty: there is no text to train on")
    check_predictable(text, f"'{path}' (data.path)")
    if isinstance(text, str) and "\0" in text:
        raise UserError(f"'{path}' (data.path) is not a text, it holds zero bytes; data.level 'byte' takes any file")


def check_predictable(text: str | bytes, name: str) -> None:
    """Check that a text has more than one character.

    Raises:
        UserError: It has not; begins with `name`.
    """
    if text and text == text[:1] * len(text):
        raise UserError(f"{name} consists of one character, {text[:1]!r}: there is nothing to predict")


def _read_file(path: str, size: int | None, as_bytes: bool) -> str | bytes:
    with reading(path, "data.path"):
        check_start(path, "data.path", as_bytes)
        if as_bytes:
            with open(path, "rb") as file:
                return file.read(-1 if size is None else size)
        try:
            with open(path, encoding="utf-8-sig", newline="") as text_file:
                return text_file.read(-1 if size is None else size)
        except UnicodeDecodeError as error:
            advice = "data.level 'byte' takes any file"
            raise UserError(f"'{path}' (data.path) is not a text in UTF-8 ({error.reason}); {advice}") from error


def _hub_texts(path: str, column: str, size: int | None) -> Iterator[str]:
    read, streaming = 0, size is not None  # streaming downloads the part that is used
    for row in hub_rows(path, split="train", streaming=streaming, local_source="file"):
        text = row.get(column)
        if not isinstance(text, str):
            raise UserError(f"'{path}' has no text in data.text_column '{column}': it has {[*row]}")
        yield text
        read += len(text)
        if size is not None and read >= size:
            return
