"""Tells a user's mistake, which is answered by a sentence, from a bug, which keeps its stack trace."""

import traceback
from pickle import UnpicklingError

from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_modules.core.checkpoints import describe_mismatch

OWN_PACKAGES = {"main", "__main__", "callbacks", "datamodules", "kernels", "lightning_modules", "studies"}


def user_message(error: BaseException) -> str | None:
    """The sentence for a user's mistake, or None for a bug.

    Mistakes are a `ValueError` that our own code raises on purpose, an `OSError` that it meets or raises, a checkpoint
    that does not fit the model or holds code, and what Lightning calls a misconfiguration.
    """
    while str(error).startswith("Does not validate against any of the Union subtypes") and error.__cause__:
        error = error.__cause__  # jsonargparse wraps what an __init__ raises
    if isinstance(error, RuntimeError) and (mismatch := describe_mismatch(error)):
        return mismatch
    if isinstance(error, UnpicklingError):
        return "the checkpoint holds more than plain data and may run code: if you trust it, add --weights_only false"
    if not isinstance(error, MisconfigurationException) and not _raised_for_users(error):
        return None
    return " ".join(str(error).split())


def _raised_for_users(error: BaseException) -> bool:
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    if frame.f_globals.get("__name__", "").partition(".")[0] not in OWN_PACKAGES:
        return False
    # `int("x")` in our code is a ValueError and yet a bug: only an explicit `raise` speaks to the user.
    line = traceback.extract_tb(error.__traceback__)[-1].line or ""
    return isinstance(error, OSError) or (isinstance(error, ValueError) and line.startswith("raise"))
