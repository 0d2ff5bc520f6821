"""Where the time of a training step of a bridge goes: by phase, and by kernel."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.profiler import ProfilerActivity, profile

from callbacks.step_phases import StepPhases, spent

PHASES = ("source", "bridge", "target", "losses", "backward", "optimizer", "between")


class Phases(StepPhases):
    """Sums the phases of some steps, for after the fit; no step waits for the device.

    `between` is the time from the end of a step to the start of the next, with the next batch's way to the device.

    Args:
        first: The first step that counts.
        last: The step before which the count ends.
    """

    def __init__(self, first: int, last: int):
        super().__init__()
        self.first, self.last = first, last
        self.kept: list[tuple[str, Any]] = []

    def is_measured(self, trainer: Trainer, batch_idx: int) -> bool:
        """Return whether the step counts."""
        return self.first <= batch_idx < self.last

    def on_train_batch_end(self, *_: object) -> None:
        """End the step."""
        self._mark("optimizer")
        self._armed = False
        self.kept += self._marks

    def milliseconds(self) -> dict[str, float]:
        """Return the mean time of each phase per step."""
        sums = spent(self.kept)
        return {phase: sums[phase] / (self.last - self.first) for phase in PHASES}


class Kernels(Callback):
    """Profiles the last steps of a fit.

    Args:
        first: The first step that is profiled.
    """

    def __init__(self, first: int):
        self.first = first
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
        self.profiler = profile(activities=activities)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Start with the first step."""
        if batch_idx == self.first:
            self.profiler.start()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop after the last kernel."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.profiler.stop()

    def rows(self, steps: int, count: int = 10) -> list[tuple[str, float, int]]:
        """Return the most expensive kernels: name, milliseconds and calls per step. On a CPU, operators."""
        on_gpu = torch.cuda.is_available()
        events = [
            event
            for event in self.profiler.key_averages()
            if not event.is_user_annotation and (not on_gpu or "CUDA" in str(event.device_type))
        ]
        time_of = {id(event): event.self_device_time_total if on_gpu else event.self_cpu_time_total for event in events}
        largest = sorted(events, key=lambda event: -time_of[id(event)])[:count]
        return [(event.key[:90], time_of[id(event)] / 1e3 / steps, event.count // steps) for event in largest]
