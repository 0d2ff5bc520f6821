"""Calls of a `from_pretrained` of transformers, with safe settings and messages that say what is missing."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
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
    elif os.path.isdir(os.path.dirname(path)) or path.count("/") > 1 or path.startswith((".", "/")):
        raise UserError(f"{where}: there is no such folder")
    else:
        context = offline_without_hub()
    try:
        with context:
            return from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # transformers, safetensors and tokenizers have no common class of errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not os.path.isdir(path):
            reason = f"there is no such folder, and {reason_of(error, path) or reason}"
        raise UserError(f"{where}: {reason}") from error


def quiet() -> None:
    """Keep progress bars and warnings of transformers off the terminal; problems are raised as errors instead."""
    from huggingface_hub.utils.logging import set_verbosity_error as quiet_hub
    from transformers.utils import logging

    silence: list[Callable[[], None]] = [logging.set_verbosity_error, logging.disable_progress_bar, quiet_hub]
    for call in silence:
        call()
