"""Rows of local data sets: JSON lines, JSON, CSV, parquet, and folders that `datasets` wrote with `save_to_disk`."""

import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from datamodules.errors import UserError
from datamodules.problem_rows import LONGEST, Row
from datamodules.sources import check_path, check_start, reading

SAVED_DICT, SAVED = "dataset_dict.json", "dataset_info.json"  # what save_to_disk writes for several splits, and for one


def has_splits(path: str) -> bool:
    """Return whether a path is a folder of `DatasetDict.save_to_disk`, whose splits have names."""
    return os.path.isfile(os.path.join(path, SAVED_DICT))


def local_rows(path: str, key: str, split: str | None = None) -> Iterator[Row]:
    """Iterate over the rows of a file or of a folder that `save_to_disk` wrote.

    The ending of a file tells its form: `.csv`, `.tsv`, `.parquet`, `.json`; all other files have a JSON object per
    line.

    Args:
        path: The file or folder.
        key: The setting that names it, for messages.
        split: The split of a folder that has several.

    Raises:
        UserError: It cannot be read, or has another form.
    """
    check_path(path, key)
    if os.path.isdir(path):
        return _saved(path, key, split)
    readers = {".csv": _table, ".tsv": _table, ".parquet": _parquet, ".json": _json}
    return readers.get(Path(path).suffix.lower(), _lines)(path, key)


@contextmanager
def _opened(path: str, key: str, newline: str | None = None) -> Iterator[TextIO]:
    with reading(path, key):
        check_start(path, key)
        # A wrong encoding spoils one row only: its bytes become surrogates, which no question may hold
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline=newline) as file:
            yield file


def _lines(path: str, key: str) -> Iterator[Row]:
    with _opened(path, key) as lines:
        for number, line in enumerate(lines, 1):
            if line.strip():
                yield f"line {number}", _parsed(line)


def _parsed(line: str) -> object:
    """Return the value of a line, or the error that it gives."""
    if len(line) > LONGEST:
        return UserError(f"longer than {LONGEST} characters")
    try:
        return json.loads(line, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        return error if isinstance(error, UserError) else UserError(f"not JSON: {error}")


def _without_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    row = dict(pairs)
    if len(row) < len(pairs):
        raise UserError("a key occurs twice")
    return row


def _json(path: str, key: str) -> Iterator[Row]:
    """Read a list of objects; a file that is no list has an object per line."""
    with _opened(path, key) as file:
        text = file.read()
    if not text.lstrip().startswith("["):
        yield from _lines(path, key)
        return
    try:
        rows = json.loads(text, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise UserError(f"'{path}' ({key}) is not valid JSON: {error}") from error
    for number, row in enumerate(rows, 1):
        yield f"row {number}", row


def _table(path: str, key: str) -> Iterator[Row]:
    """Read a table with a header. All cells are texts: no type is guessed from the first rows."""
    with _opened(path, key, newline="") as file:
        delimiter = max(",;\t", key=next(filter(str.strip, file), "").count)
        file.seek(0)
        rows = csv.reader(file, delimiter=delimiter)
        try:
            header = next(filter(None, rows), [])  # a blank line has no cells
        except csv.Error as error:
            raise UserError(f"'{path}' ({key}) has no header that can be read: {error}") from error
        for name in header:
            if header.count(name) > 1:
                raise UserError(f"'{path}' ({key}) has the column '{name}' twice")
        while True:
            try:
                cells = next(rows)
            except StopIteration:
                return
            except csv.Error as error:
                yield f"line {rows.line_num}", UserError(str(error))
                continue
            if cells:  # a blank line has none
                uneven = UserError(f"cells: {len(cells)}, columns: {len(header)}")
                row = dict(zip(header, cells, strict=True)) if len(cells) == len(header) else uneven
                yield f"line {rows.line_num}", row


def _parquet(path: str, key: str) -> Iterator[Row]:
    from pyarrow import ArrowException  # type: ignore[import-untyped]  # no other source needs it
    from pyarrow.parquet import ParquetFile  # type: ignore[import-untyped]

    number = 0
    with reading(path, key):
        try:
            for batch in ParquetFile(path).iter_batches():
                for row in batch.to_pylist():
                    yield f"row {(number := number + 1)}", row
        except (ArrowException, OSError) as error:
            raise UserError(f"{key}: cannot read '{path}' as parquet: {_one_line(error)}") from error


def _saved(path: str, key: str, split: str | None) -> Iterator[Row]:
    if not any(os.path.isfile(os.path.join(path, name)) for name in (SAVED_DICT, SAVED)):
        files = sorted(file.name for file in Path(path).iterdir() if file.is_file())[:10]
        advice = f"name a file, such as one of {files}" if files else "name a file"
        raise UserError(f"{key}: cannot read '{path}': it is a folder that save_to_disk did not write, {advice}")
    try:
        from datasets import DatasetDict, load_from_disk  # type: ignore[import-untyped]  # it takes seconds

        data = load_from_disk(path)
        if isinstance(data, DatasetDict):
            if split not in data:
                raise UserError(f"{key}: '{path}' has no split '{split}', only {[*data]}: set data.splits")
            data = data[split]
        for number, row in enumerate(data, 1):
            yield f"row {number}", row
    except UserError:
        raise
    except Exception as error:  # damaged files end in errors of many kinds
        raise UserError(f"{key}: cannot read '{path}' as a saved data set: {_one_line(error)}") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__
