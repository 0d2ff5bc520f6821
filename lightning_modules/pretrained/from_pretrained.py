"""Calls of a `from_pretrained` of transformers, with safe settings and messages that say what is missing."""

import json
import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

from datamodules.errors import UserError
from datamodules.hub import offline_without_hub, reason_of
from datamodules.sources import check_path


def load(from_pretrained: Callable[..., Any], what: str, path: str, **options: Any) -> Any:
    """Call a `from_pretrained` with safe settings.

    Raises:
        UserError: It fails; the sentence says what is missing and where.
    """
    quiet()
    where = f"cannot load {what} from '{path}'"
    check_path(path, where)
    if os.path.isfile(path):
        raise UserError(f"{where}: it is a file, name the folder that save_pretrained wrote")
    if os.path.isdir(path):
        context: AbstractContextManager[None] = nullcontext()
        _check_json("*config.json", path, where)  # transformers takes its defaults for some that it cannot read
    elif os.path.isdir(os.path.dirname(path)) or path.count("/") > 1 or path.startswith((".", "/")):
        raise UserError(f"{where}: there is no such folder")
    else:
        context = offline_without_hub()
    try:
        with context:
            return from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # transformers, safetensors and tokenizers have no common class of errors
        if os.path.isdir(path):
            _check_json("tokenizer.json", path, where)
            reason = _reason(error)
        else:
            reason = f"there is no such folder, and {reason_of(error, path) or _reason(error)}"
        raise UserError(f"{where}: {reason}") from error


def _check_json(pattern: str, folder: str, where: str) -> None:
    """Refuse files that are not a whole JSON object; the errors of transformers and tokenizers name no file."""
    for file in sorted(Path(folder).glob(pattern)):
        try:
            is_object = isinstance(json.loads(file.read_bytes()), dict)
        except (OSError, ValueError, RecursionError):
            is_object = False
        if not is_object:
            raise UserError(f"{where}: {file.name} is damaged, it is not a whole JSON object")


def _reason(error: Exception) -> str:
    """Return the first sentence of an error, with its kind where the sentence alone says little."""
    first, *rest = str(error).strip().splitlines() or [""]
    sentence = f"{first} {rest[0].strip()}" if rest and first.endswith(":") else first
    bare = not sentence or isinstance(error, AttributeError | KeyError | TypeError)
    return f"{type(error).__name__} {sentence}".strip() if bare else sentence


def quiet() -> None:
    """Keep progress bars and warnings of transformers off the terminal; problems are raised as errors instead."""
    from huggingface_hub.utils.logging import set_verbosity_error as quiet_hub
    from transformers.utils import logging

    silence: list[Callable[[], None]] = [logging.set_verbosity_error, logging.disable_progress_bar, quiet_hub]
    for call in silence:
        call()
