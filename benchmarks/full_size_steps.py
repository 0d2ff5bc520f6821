"""Batches of several sizes in one fit, and a module that stays on its device, for `full_size.py`."""

from collections.abc import Generator
from itertools import islice
from typing import Any

from benchmarks.step_rates import Part
from datamodules import WordProblems
from lightning_modules.telepathy import Telepathy


class Parts(WordProblems):
    """Batches of several sizes, one after the other, in one fit.

    Args:
        parts: The sizes and numbers of batches.
        **options: Options of `WordProblems`.
    """

    def __init__(self, parts: list[Part], **options: Any):
        super().__init__(source="file", batch_size=1, validation_size=16, test_sets={"test": 16}, **options)
        self.parts = parts
        self._running: Generator[object] | None = None

    def train_dataloader(self) -> Any:
        """Return an iterator over the batches of all parts."""
        self._running = self._batches()
        return self._running

    def _batches(self) -> Generator[object]:
        for part in self.parts:
            self.batch_size, self.max_tokens, left = part.rows, part.tokens, part.steps
            while left:
                for batch in islice(super().train_dataloader(), left):
                    left -= 1
                    yield batch

    def close(self) -> None:
        """End the processes that make batches. They ignore signals, and a program with an error would wait for them."""
        if self._running is not None:
            self._running.close()


class Staying(Telepathy):
    """A module that stays on its device at the end of a fit, where Lightning moves it to the CPU."""

    def cpu(self) -> "Staying":
        """Do nothing."""
        return self
