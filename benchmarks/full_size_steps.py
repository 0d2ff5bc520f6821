"""Batches of several sizes in one fit, and a module that stays on its device, for `full_size.py`."""

from collections.abc import Iterator
from typing import Any

from benchmarks.step_rates import WARMUP, Part
from datamodules import WordProblems
from lightning_modules.telepathy import Telepathy


class Parts(WordProblems):
    """Batches of several sizes, one after the other, in one fit.

    Each size has all problems once, so its figures do not depend on which were drawn, and before them its largest batch
    `WARMUP` times. The batches of a size are made before its first step, so their making does not count.

    Args:
        parts: The sizes of batches.
        **options: Options of `WordProblems`.
    """

    def __init__(self, parts: list[Part], **options: Any):
        super().__init__(source="file", batch_size=1, validation_size=1, test_sets={"test": 16}, **options)
        self.parts = parts

    def train_dataloader(self) -> Any:
        """Return an iterator over the batches of all parts."""
        return self._batches()

    def _batches(self) -> Iterator[object]:
        module: Any = self._module
        for part in self.parts:
            self.batch_size, self.max_tokens = part.rows, part.tokens
            made = list(super().train_dataloader())
            largest = max(made, key=lambda batch: int(module.workload(batch).tokens))
            batches = [largest] * WARMUP + made
            part.steps = part.steps or len(batches)
            yield from batches[: part.steps]


class Staying(Telepathy):
    """A module that stays on its device at the end of a fit, where Lightning moves it to the CPU."""

    def cpu(self) -> "Staying":
        """Do nothing."""
        return self
