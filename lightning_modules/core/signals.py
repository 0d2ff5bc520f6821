"""Signals that end a process: in order at the first one, at once at a second one. Imports nothing that takes time."""

import math
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

REPEATED = 1.0  # seconds in which a second signal is taken for the same one, sent to a process and to its group


class Interrupted(BaseException):
    """A signal ends the process. It is no `Exception`, so that no library takes it for an error of its own.

    Attributes:
        number: The signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as shells count."""
        return 128 + self.number


class Signals:
    """Takes signals inside a block, which it is used as: `with Signals(...) as signals`.

    The first signal raises `Interrupted` at once, or at the next `check` while the process has asked for time by
    `hold`. A second signal ends the process at once, and so does a block that lasts longer after the first signal than
    the time of grace. Signals that are ignored when the block begins, as under `nohup`, stay so.

    Args:
        numbers: The signals.
        advice: What is said when the process ends at once.
        grace: Seconds from the first signal, or from `renew_deadline`, to the end of the block; no limit by default.

    Attributes:
        received: The first signal, or None.
        agreed: Whether all ranks of a run end for it together.
        quiet: Whether a signal that is kept is not spoken of.
        before_end: Called before the process ends at once.
    """

    def __init__(self, numbers: Sequence[signal.Signals], advice: str, grace: float = math.inf) -> None:
        self.numbers, self.advice, self.grace = numbers, advice, grace
        self.received: int | None = None
        self.quiet = self.agreed = False
        self.before_end: Callable[[], None] = lambda: None
        self._held = ""
        self._deadline: float | None = None
        self._former: dict[int, Any] = {}
        self._former_pipe = self._writing = -1

    def __enter__(self) -> "Signals":
        if threading.current_thread() is not threading.main_thread():  # the only thread that may set handlers
            return self
        former = {number: signal.getsignal(number) for number in self.numbers}
        self._former = {number: old for number, old in former.items() if old not in (signal.SIG_IGN, None)}
        for number in self._former:
            signal.signal(number, self._receive)
        reading, self._writing = os.pipe()
        os.set_blocking(self._writing, False)
        self._former_pipe = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=[reading], daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._writing >= 0:
            signal.set_wakeup_fd(self._former_pipe)
            os.close(self._writing)
            self._writing = -1

    def hold(self, sentence: str) -> None:
        """Keep the next signal until `check`, and say the sentence when it comes; an empty sentence ends that."""
        self._held = sentence

    def let_go(self) -> None:
        """Raise the next signal at once again, and one that was kept now."""
        self._held = ""
        self.check()

    def check(self) -> None:
        """Raise `Interrupted` if a signal has been kept."""
        if self.received is not None:
            raise Interrupted(self.received)

    def suspend_deadline(self) -> None:
        """Allow what ends the process all the time it takes, such as the saving of a large checkpoint."""
        self._deadline = math.inf

    def renew_deadline(self) -> None:
        """Begin the time again in which the process has to end."""
        self._deadline = time.monotonic() + self.grace

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self.received is not None:
            return  # `_watch` sees to it
        self.received = number
        if not self._held:
            raise Interrupted(number)
        if not self.quiet:
            _say(f"{signal.Signals(number).name}: {self._held}; a second signal ends it at once")

    def _watch(self, reading: int) -> None:
        """End the process at a second signal or at the deadline.

        A thread does it, for the main thread may be in a library that never returns: then Python runs no handler, but
        it writes the number of each signal into a pipe.
        """
        first, first_at = 0, 0.0
        while True:
            came = os.read(reading, 64) if select.select([reading], [], [], 0.2)[0] else b""
            now = time.monotonic()
            for number in filter(self._former.__contains__, came):
                if not first:
                    first, first_at = number, now
                    self._deadline = now + self.grace if self._deadline is None else self._deadline
                elif now - first_at > REPEATED:
                    self._end_process(number)
            if self._writing < 0:
                os.close(reading)
                return
            if self._deadline is not None and now > self._deadline:
                self._end_process(first)

    def _end_process(self, number: int) -> None:
        try:
            self.before_end()
        finally:
            _say(f"ended at once: {self.advice}")
            os._exit(128 + number)


def _say(sentence: str) -> None:
    """Write to stderr in one call, which is safe in a handler."""
    os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, f"\n{sentence}\n".encode())
