"""The Hugging Face hub: an answer within seconds where it cannot be reached, and what its refusals mean."""

import ssl
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from threading import Thread
from typing import Any

PATIENCE = 4.0  # seconds to wait for a first answer of the hub
REMEMBERED = 60  # seconds for which the result holds


@contextmanager
def offline_without_hub() -> Iterator[None]:
    """Read the cache alone inside the block, if the hub does not answer.

    The libraries of the hub would repeat each request five times with pauses, 23 seconds for one file. In their
    offline mode they take what the cache holds and otherwise fail at once.
    """
    from huggingface_hub import constants

    # `datasets` copies the setting, and takes seconds to import for those who do not use it
    owners: list[Any] = [constants, *filter(None, [sys.modules.get("datasets.config")])]
    before = [owner.HF_HUB_OFFLINE for owner in owners]
    offline = any(before) or not _answers(constants.ENDPOINT, int(time.monotonic()) // REMEMBERED)
    try:
        for owner in owners:
            owner.HF_HUB_OFFLINE = offline
        yield
    finally:
        for owner, value in zip(owners, before, strict=True):
            owner.HF_HUB_OFFLINE = value


@lru_cache(maxsize=1)
def _answers(address: str, period: int) -> bool:
    """Return whether a server answers at an address, with whatever status; `period` limits how long that holds."""
    answered: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(address, method="HEAD")
            urllib.request.urlopen(request, timeout=PATIENCE).close()
        except urllib.error.HTTPError:
            pass  # an answer too
        except (OSError, ValueError) as error:
            if not isinstance(getattr(error, "reason", error), ssl.SSLError):  # another library may have certificates
                return
        answered.append(True)

    # In a thread, because no timeout bounds the look-up of a name
    thread = Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return bool(answered)


def reason_of(error: BaseException | None, name: str) -> str | None:
    """Return why the hub did not give `name`, if an error or one of its causes says so; else None."""
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    found: list[BaseException] = []
    while error is not None and error not in found:
        found.append(error)
        error = error.__cause__ or error.__context__
    for cause in reversed(found):
        match cause:
            case GatedRepoError():
                return "it is gated: ask for access on its page, then log in with `hf auth login`"
            case RepositoryNotFoundError():
                return "the hub has no such public entry: correct the name, or log in with `hf auth login`"
            case OfflineModeIsEnabled() | LocalEntryNotFoundError():
                return "the hub cannot be reached, and the cache on this machine does not hold it"
            case HFValidationError():
                return f"'{name}' is neither a folder nor a name on the hub, which has the form owner/name"
            case HfHubHTTPError():
                return f"the hub refused with status {cause.response.status_code}"
    return None
