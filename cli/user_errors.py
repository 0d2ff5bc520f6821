"""Distinguishes a user's mistake, which ends in one sentence, from a bug, which keeps its stack trace."""

import re
from collections.abc import Iterator
from errno import EDQUOT, EFBIG, ENOSPC, EROFS
from pickle import UnpicklingError
from traceback import walk_tb

from datamodules.errors import UserError

FROM_WORKER = re.compile(r"^[\w.]*UserError: ", re.MULTILINE)  # in the stack trace that a worker sends
OWN = ("callbacks.", "datamodules.", "lightning_modules.")
CONFIGURED = tuple(f"lightning.pytorch.{part}" for part in ("callbacks", "loggers", "plugins", "profilers", "tuner"))
DISK_ERRORS = {ENOSPC, EDQUOT, EFBIG, EROFS}
NO_METRIC = "conditioned on metric"  # EarlyStopping finds only at a validation that nothing logs its metric
TOO_LARGE = re.compile(r"Storage size calculation overflowed|numel: integer multiplication overflow|[Ii]nvalid size")
NO_MEMORY = re.compile(r"out of memory|can't allocate memory", re.IGNORECASE)
ABSTRACT = re.compile(r"Can't instantiate abstract class (\w+)")
SIZE = re.compile(r"allocate (\d+ bytes|[\d.]+ [KMGT]iB)", re.IGNORECASE)


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
            return _memory_message(cause)
    return None


def library_message(error: BaseException) -> str | None:
    """Return the sentence for an error of a library's callback, logger, profiler or plugin that the user configured.

    Before the first training step, what these refuse is a setting: a missing package, a folder that cannot be made, a
    model without what a callback needs.
    """
    if not isinstance(error, AttributeError | ImportError | OSError | ValueError):
        return None
    modules = _modules(error)
    last_own = max((i for i, name in enumerate(modules) if name.startswith(OWN)), default=-1)
    configured = [name for name in modules[last_own + 1 :] if name.startswith(CONFIGURED)]
    full = isinstance(error, OSError) and error.errno in DISK_ERRORS
    return None if full or not configured else _joined(f"trainer: {configured[-1].rpartition('.')[2]}: {error}")


def is_too_large(error: BaseException) -> bool:
    """Return whether an error says that memory has no room for what should be made."""
    return isinstance(error, MemoryError) or bool(NO_MEMORY.search(str(error)) or TOO_LARGE.search(str(error)))


def _sentence(error: BaseException) -> str | None:
    if isinstance(error, UserError):
        return _joined(FROM_WORKER.split(str(error))[-1])
    if isinstance(error, TypeError) and (match := ABSTRACT.match(str(error))):
        return f"{match[1]} is an abstract class: name one of its subclasses"
    # These imports take seconds, which a user's mistake in a light command need not wait for.
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    from lightning_modules.core.checkpoints import describe_mismatch

    if isinstance(error, MisconfigurationException):
        return _joined(str(error))
    if isinstance(error, UnpicklingError) and "Weights only load failed" in str(error):
        return "the checkpoint holds more than plain data and may run code: if you trust it, add --weights_only false"
    if isinstance(error, RuntimeError) and NO_METRIC in str(error):
        return _joined(str(error))
    return describe_mismatch(error) if isinstance(error, RuntimeError) else None


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def _memory_message(error: BaseException) -> str:
    size = SIZE.search(str(error))
    amount = f" (the last allocation was of {_readable(size[1])})" if size else ""
    own = next((name for name in reversed(_modules(error)) if name.startswith(OWN)), "")
    place = f" in {own}" if own else ""
    if own.startswith("callbacks."):
        advice = "lower the sizes of the callback, or data.eval_batch_size"
    elif own.startswith("datamodules."):
        advice = "lower data.batch_size or the other sizes of the data"
    else:
        advice = (
            "lower data.batch_size, or data.eval_batch_size if it happened in evaluation, or the sizes of the model,"
            " or set trainer.precision to bf16-mixed"
        )
    return f"out of memory{place}{amount}: {advice}"


def _modules(error: BaseException) -> list[str]:
    """Return the modules of the frames through which an error went, the one that raised it last."""
    return [frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__)]


def _joined(text: str) -> str:
    return " ".join(text.split())


def _readable(size: str) -> str:
    number, unit = size.split()
    return f"{int(number) / 2**30:.2f} GiB" if unit == "bytes" else size
