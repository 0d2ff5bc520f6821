"""How fast a run trains: samples, tokens and FLOPs a second, time spent waiting for data, peak memory."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype
from torch import Tensor
from torch.utils._pytree import tree_leaves

from datamodules.errors import UserError
from lightning_modules.core.contracts import Workload


@contextmanager
def off_the_clock(trainer: Trainer) -> Iterator[None]:
    """Leaves what runs inside, such as an evaluation amid training, out of the rates of the trainer's `Throughput`."""
    callbacks = [callback for callback in trainer.callbacks if isinstance(callback, Throughput)]
    for callback in callbacks:
        callback.pause(trainer)
    try:
        yield
    finally:
        for callback in callbacks:
            callback.resume(trainer)


@dataclass
class _Tally:
    """What was done since `started`, a time on the clock; `paused` and `waited` in seconds, counts on this rank."""

    started: float
    paused: float = 0.0
    waited: float = 0.0
    samples: int = 0
    tokens: int = 0
    flops: int | None = 0

    def add(self, workload: Workload) -> None:
        self.samples += workload.samples
        self.tokens += workload.tokens
        self.flops = None if self.flops is None or workload.flops is None else self.flops + workload.flops


class Throughput(Callback):
    """Logs the rates of training over each interval; when fit ends, `trainer.callback_metrics` has those of all of it.

    - `throughput/samples_per_s`, `throughput/tokens_per_s`: over all ranks, taking every rank's batches for as large as
      rank zero's;
    - `throughput/data_wait`: the fraction of time from the end of one batch to the start of the next: fetching and
      moving data, and saving checkpoints. On a GPU an upper bound, for the device may have work queued meanwhile;
    - `throughput/peak_memory_gib`: allocated on the CUDA device, or resident in the process on a CPU;
    - `throughput/mfu`: model FLOPs over the device's peak, where both are known.

    Counts come from `pl_module.workload(batch) -> Workload`. For a module without it, the samples are the first
    dimension of the batch's first tensor, and the tokens the elements of `batch["tokens"]`.

    Validation is left out of the time, and so is what runs under `off_the_clock`. The first batch after a start or a
    resumption is not counted: it pays for compilation and for starting workers. The device is synchronised when logging
    and around what is left out, never by step.

    Args:
        every_n_steps: Optimizer steps an interval; by default the Trainer's `log_every_n_steps`.
        peak_flops: Peak FLOP/s of one device in the training precision. By default from Lightning's table, which does
            not know every device: "NVIDIA H200" is one that it warns about.

    Raises:
        UserError: If `every_n_steps` is not positive.
    """

    def __init__(self, every_n_steps: int | None = None, peak_flops: float | None = None) -> None:
        if every_n_steps is not None and every_n_steps < 1:
            raise UserError(f"`every_n_steps` must be positive, got {every_n_steps}.")
        self.every_n_steps = every_n_steps
        self.peak_flops = peak_flops
        self._peak: float | None = None
        self._reset()

    def _reset(self) -> None:
        self._run: _Tally | None = None
        self._interval: _Tally | None = None
        self._batch_ended = 0.0
        self._paused_since_batch = 0.0
        self._paused_at = 0.0
        self._pauses = 0
        self._last_step = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Looks up the device's peak, which warns for a device that Lightning does not know."""
        self._peak = self.peak_flops
        if stage == "fit" and self._peak is None and hasattr(pl_module, "workload"):
            dtype = _plugin_to_compute_dtype(trainer.precision_plugin)
            self._peak = get_available_flops(trainer.strategy.root_device, dtype)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forgets an earlier fit."""
        self._reset()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Adds the time since the last batch to the wait."""
        waited = time.perf_counter() - self._batch_ended - self._paused_since_batch
        for tally in self._tallies():
            tally.waited += waited

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Counts the batch, and logs where an interval ends."""
        if self._run is None:
            now = _clock(trainer)
            self._run, self._interval = _Tally(now), _Tally(now)
        else:
            workload = _workload(pl_module, batch)
            for tally in self._tallies():
                tally.add(workload)
            every = self.every_n_steps or trainer.log_every_n_steps
            if every and trainer.global_step // every > self._last_step // every:
                metrics = self._metrics(trainer, self._interval)
                for logger in trainer.loggers:
                    logger.log_metrics(metrics, step=trainer.fit_loop.epoch_loop._batches_that_stepped)
                self._interval = _Tally(_clock(trainer))
        self._last_step = trainer.global_step
        self._paused_since_batch = 0.0
        self._batch_ended = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leaves the rates of the whole fit where results are read."""
        if self._run is not None and self._run.samples:
            metrics = self._metrics(trainer, self._run)
            trainer.callback_metrics.update({name: torch.tensor(value) for name, value in metrics.items()})

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stops the clock."""
        self.pause(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Lets the clock run on."""
        self.resume(trainer)

    def pause(self, trainer: Trainer) -> None:
        """Stops the clock: what follows is not training. Pauses may nest."""
        if self._pauses == 0:
            self._paused_at = _clock(trainer)
        self._pauses += 1

    def resume(self, trainer: Trainer) -> None:
        """Lets the clock run on after `pause`."""
        self._pauses -= 1
        if self._pauses:
            return
        paused = _clock(trainer) - self._paused_at
        self._paused_since_batch += paused
        for tally in self._tallies():
            tally.paused += paused

    def _tallies(self) -> list[_Tally]:
        return [self._run, self._interval] if self._run is not None else []

    def _metrics(self, trainer: Trainer, tally: _Tally) -> dict[str, float]:
        seconds = _clock(trainer) - tally.started - tally.paused
        metrics = {
            "samples_per_s": tally.samples * trainer.world_size / seconds,
            "data_wait": tally.waited / seconds,
            "peak_memory_gib": _peak_memory(trainer.strategy.root_device) / 2**30,
        }
        if tally.tokens:
            metrics["tokens_per_s"] = tally.tokens * trainer.world_size / seconds
        if tally.flops and self._peak:
            metrics["mfu"] = tally.flops / seconds / self._peak
        return {f"throughput/{name}": value for name, value in metrics.items()}


def _clock(trainer: Trainer) -> float:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
    return time.perf_counter()


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _workload(pl_module: LightningModule, batch: Any) -> Workload:
    if hasattr(pl_module, "workload"):
        return pl_module.workload(batch)
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    tokens = batch.get("tokens") if isinstance(batch, Mapping) else None
    return Workload(samples=len(tensors[0]) if tensors else 0, tokens=tokens.numel() if tokens is not None else 0)
