"""Distinguishes a user's mistake, which ends in one sentence, from a bug, which keeps its stack trace."""

import re
from collections.abc import Iterator
from errno import EDQUOT, EFBIG, ENOSPC, EROFS
from pickle import UnpicklingError

from datamodules.errors import UserError

FROM_WORKER = re.compile(r"^[\w.]*UserError: ", re.MULTILINE)  # in the stack trace that a worker sends
DISK_ERRORS = {ENOSPC, EDQUOT, EFBIG, EROFS}
NO_MEMORY = re.compile(r"out of memory|can't allocate memory", re.IGNORECASE)
SIZE = re.compile(r"tried to allocate (\d+ bytes|[\d.]+ [KMGT]iB)", re.IGNORECASE)


def user_message(error: BaseException) -> str | None:
    """Return the sentence for a user's mistake, or None for a bug.

    A user's mistake is a `UserError`, a checkpoint that does not fit the model or holds code, or what Lightning calls
    a misconfiguration. jsonargparse wraps what a class raises as it is built, so that causes are searched too.
    """
    return next((sentence for cause in _chain(error) if (sentence := _sentence(cause))), None)


def host_message(error: BaseException) -> str | None:
    """Return the sentence for a full disk or exhausted memory, of the device or of the host; None for other errors."""
    for cause in _chain(error):
        if isinstance(cause, OSError) and cause.errno in DISK_ERRORS:
            place = f"cannot write {cause.filename}: " if cause.filename else ""
            return f"{place}{cause.strerror}; the checkpoints and results that were written before are whole"
        if isinstance(cause, MemoryError) or (isinstance(cause, RuntimeError) and NO_MEMORY.search(str(cause))):
            size = SIZE.search(str(cause))
            amount = f" (the last allocation was of {_readable(size[1])})" if size else ""
            return (
                f"out of memory{amount}: lower data.batch_size, or data.eval_batch_size if it happened in evaluation,"
                " or set trainer.precision to bf16-mixed"
            )
    return None


def _sentence(error: BaseException) -> str | None:
    if isinstance(error, UserError):
        return _joined(FROM_WORKER.split(str(error))[-1])
    # These imports take seconds, which a user's mistake in a light command need not wait for.
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lightning_modules.core.checkpoints import describe_mismatch

    if isinstance(error, MisconfigurationException):
        return _joined(str(error))
    if isinstance(error, UnpicklingError) and "Weights only load failed" in str(error):
        return "the checkpoint holds more than plain data and may run code: if you trust it, add --weights_only false"
    return describe_mismatch(error) if isinstance(error, RuntimeError) else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _joined(text: str) -> str:
    return " ".join(text.split())


def _readable(size: str) -> str:
    number, unit = size.split()
    return f"{int(number) / 2**30:.2f} GiB" if unit == "bytes" else size
