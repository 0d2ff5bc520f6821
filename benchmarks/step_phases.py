"""Where the time of a training step of a bridge goes: by phase, and by kernel."""

import time
from collections import defaultdict
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from torch.profiler import ProfilerActivity, profile

PHASES = ("source", "bridge", "target", "losses", "backward", "clipping and optimizer", "other")


class Phases(Callback):
    """Marks the ends of the phases of each step on the device, without a wait, and sums them after the fit.

    `other` is the time from the end of a step to the source's first kernel: the next batch on its way to the device.

    Args:
        first: The first step that counts.
        last: The step before which the count ends.
    """

    def __init__(self, first: int, last: int):
        self.first, self.last = first, last
        self.marks: list[tuple[str, Any]] = []
        self.handles: list[Any] = []
        self.counts = False

    def _mark(self, phase: str) -> None:
        if not self.counts:
            return
        if torch.cuda.is_available():
            event: Any = torch.cuda.Event
            mark = event(enable_timing=True)
            mark.record()
        else:
            mark = time.perf_counter()
        self.marks.append((phase, mark))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Watch the parts of the module."""
        parts: dict[str, nn.Module] = {"bridge": pl_module.bridge, "target": pl_module.target.model}  # type: ignore[dict-item, union-attr]  # of Telepathy
        for name, part in parts.items():
            before = "source" if name == "bridge" else "bridge"
            self.handles.append(part.register_forward_pre_hook(lambda *_, before=before: self._mark(before)))
        self.handles.append(parts["target"].register_forward_hook(lambda *_: self._mark("target")))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """End what lies between two steps."""
        self.counts = self.first <= batch_idx < self.last
        self._mark("other")  # the first mark starts the clock

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: torch.Tensor) -> None:
        """End the forward."""
        self._mark("losses")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the backward."""
        self._mark("backward")

    def on_train_batch_end(self, *_: object) -> None:
        """End the step."""
        self._mark("clipping and optimizer")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the module as it was."""
        for handle in self.handles:
            handle.remove()

    def milliseconds(self) -> dict[str, float]:
        """Return the mean time of each phase per step."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        sums: dict[str, float] = defaultdict(float)
        for (_, begin), (phase, end) in zip(self.marks, self.marks[1:], strict=False):
            sums[phase] += 1e3 * (end - begin) if isinstance(end, float) else begin.elapsed_time(end)
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
