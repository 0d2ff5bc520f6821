"""The table of `full_size.py`: a row for the steps with batches of each size."""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from lightning.pytorch import Callback, LightningModule

WARMUP = 2  # steps of each size that do not count; they have its largest batch, for which memory is made
HEAD = "way | rows | samples/s | ms per step | peak GiB | MFU | positions per row | most positions of a batch"


def tell(text: str) -> None:
    """Print a line, in the first process alone."""
    if not int(os.environ.get("LOCAL_RANK", 0)):
        print(text, flush=True)


def synchronise() -> None:
    """Wait for the work that was given to a GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def process_seconds() -> float:
    """Return the seconds since this process has been started; imports count."""
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


@dataclass
class Part:
    """Steps with batches of one size: of `rows` problems, or of up to `tokens` positions.

    Attributes:
        steps: All steps, with the first `WARMUP`. Who makes the batches sets it, if it is 0, for all problems once.
    """

    rows: int
    tokens: int | None = None
    steps: int = 0

    @property
    def name(self) -> str:
        """The size of a batch, in words."""
        return str(self.rows) if self.tokens is None else f"{self.tokens} positions"


class Rates(Callback):
    """Times the steps of each part, after its first ones, and prints a row of the table at its end.

    Args:
        way: The name of what is measured.
        parts: The sizes of batches, in their order.
        peak: FLOP/s of the device.
        keep: Takes each row as soon as it is measured; None to print none.
    """

    def __init__(self, way: str, parts: list[Part], peak: float, keep: Callable[[dict[str, Any]], None] | None = None):
        self.way, self.parts, self.peak, self.keep = way, list(parts), peak, keep
        self.rows: list[dict[str, Any]] = []
        self.first_step = 0.0  # seconds
        self._begin()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with the first part, after what the start takes."""
        self._begin()

    def _begin(self) -> None:
        self.step = self.samples = self.positions = self.flops = self.most = 0
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a step."""
        self.count(pl_module.workload(batch), trainer.world_size)  # type: ignore[operator]  # of Telepathy

    def count(self, work: Any, world: int = 1) -> None:
        """Count a step of this size."""
        self.step += 1
        if not self.first_step:
            synchronise()
            self.first_step = process_seconds()
        if self.step > WARMUP:
            self.samples, self.positions = self.samples + work.samples, self.positions + work.tokens
            self.flops += work.flops
        self.most = max(self.most, work.tokens)
        if self.step == WARMUP:
            synchronise()
            self.began = time.perf_counter()
        if self.step == self.parts[0].steps:
            self._end(world)

    def _end(self, world: int) -> None:
        synchronise()
        seconds, part = time.perf_counter() - self.began, self.parts.pop(0)
        peak = torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else float("nan")
        row = {"way": self.way, "rows": part.name, "devices": world, "samples_per_s": self.samples * world / seconds}
        row |= {"ms": 1e3 * seconds / (part.steps - WARMUP), "gib": peak, "mfu": self.flops / seconds / self.peak}
        row |= {"positions": self.positions / self.samples, "most": self.most, "first_step": self.first_step}
        self.add(row)
        self._begin()

    def out_of_memory(self) -> None:
        """Add a row for each part that is left."""
        for part in self.parts:
            self.add({"way": self.way, "rows": part.name, "gib": None})

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row and print it."""
        self.rows.append(row)
        if self.keep is None:
            return
        self.keep(row)
        if row["gib"] is None:
            cells = [row["way"], row["rows"], "out of memory", *[""] * 5]
        else:
            cells = [row["way"], row["rows"], f"{row['samples_per_s']:.1f}", f"{row['ms']:.0f}", f"{row['gib']:.1f}"]
            cells += [f"{row['mfu']:.1%}", f"{row['positions']:.0f}", str(row["most"])]
        tell("| " + " | ".join(cells) + " |")
