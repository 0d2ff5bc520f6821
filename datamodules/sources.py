"""Files and hub data sets that the user named: what goes wrong while they are read becomes a UserError."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from datamodules.errors import UserError


@contextmanager
def reading(path: str | Path, key: str) -> Iterator[None]:
    """Translate what the operating system raises while a file is opened and read.

    Args:
        path: The file.
        key: The setting that names the file, such as `data.path`.

    Raises:
        UserError: The file is missing or cannot be read.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"no data file at '{path}' ({key})") from error
    except OSError as error:
        raise UserError(f"{key}: cannot read '{path}': {error.strerror or error}") from error


def hub_rows(
    name: str, *config: str, split: str, streaming: bool = False, local_source: str
) -> Iterator[dict[str, Any]]:
    """Iterate over the rows of a data set on the Hugging Face hub.

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
        yield from load_dataset(name, *config, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        # RuntimeError: a data set that is a script. A DatasetGenerationError does not name the reason, its cause does
        reason = error.__cause__ or error if isinstance(error, DatasetGenerationError) else error
        sentence = " ".join(str(reason).split()).rstrip(".")
        raise UserError(
            f"data.path: cannot read '{name}' from the Hugging Face hub: {sentence}; "
            f"data.source '{local_source}' reads a local file"
        ) from error
