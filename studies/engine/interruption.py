"""Signals to a study: the first ends it in order, a second one at once. Imports nothing that takes time."""

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
REPEATED = 1.0  # seconds in which a second signal is taken for the same one, sent to a process and to its group
ADVICE = "call it again to continue"


class Interrupted(BaseException):
    """The study was ended by a signal. It is no `Exception`, so that no library takes it for an error of its own.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as shells count."""
        return 128 + self.number


class Interruption:
    """Raises `Interrupted` at the first signal, and ends the process at a later one.

    Attributes:
        before_end: Called before the process is ended at once; it ends other processes.
    """

    def __init__(self) -> None:
        self.before_end: Callable[[], None] = lambda: None
        self._received_at: float | None = None

    def receive(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        now = time.monotonic()
        if self._received_at is None:
            self._received_at = now
            raise Interrupted(number)
        if now - self._received_at > REPEATED:
            try:
                self.before_end()
            finally:
                os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\nended at once: {ADVICE}\n".encode())
                os._exit(128 + number)


@contextmanager
def interruptible() -> Iterator[Interruption]:
    """Take signals inside the block; those that are ignored when it begins, as under `nohup`, stay so."""
    interruption = Interruption()
    in_charge = threading.current_thread() is threading.main_thread()  # the only thread that may set handlers
    former = {number: signal.getsignal(number) for number in SIGNALS if in_charge}
    taken = {number: handler for number, handler in former.items() if handler not in (signal.SIG_IGN, None)}
    for number in taken:
        signal.signal(number, interruption.receive)
    try:
        yield interruption
    finally:
        for number, handler in taken.items():
            signal.signal(number, handler)
