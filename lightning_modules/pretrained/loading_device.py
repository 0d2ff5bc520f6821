"""The device that models are loaded to."""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_device: ContextVar[torch.device | None] = ContextVar("device", default=None)  # None for the CPU


@contextmanager
def loading_to(device: torch.device) -> Iterator[None]:
    """Put the models that are loaded inside the block on a device, without a copy in the memory of the CPU."""
    token = _device.set(device)
    try:
        yield
    finally:
        _device.reset(token)


def loading_device() -> torch.device:
    """Return the device of `loading_to`; the CPU outside of it."""
    return _device.get() or torch.device("cpu")
