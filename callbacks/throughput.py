"""Rates of training: samples, tokens and FLOPs per second, time spent waiting for data, and peak memory."""

import resource
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks.throughput_monitor import _plugin_to_compute_dtype
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.utils._pytree import tree_leaves

from callbacks.base import EveryNSteps, check_positive, refuse_second
from lightning_modules.core.contracts import SupportsWorkload, Workload, connected
from lightning_modules.core.reporting import keep_scalars, log_scalars


@contextmanager
def off_the_clock(trainer: Trainer) -> Iterator[None]:
    """Exclude the time of the block, such as an evaluation during training, from the rates of `Throughput`."""
    callbacks = [callback for callback in connected(trainer).callbacks if isinstance(callback, Throughput)]
    for callback in callbacks:
        callback.pause(trainer)
    try:
        yield
    finally:
        for callback in callbacks:
            callback.resume(trainer)


@dataclass
class _Tally:
    """Work on this rank since `started`, a time on the clock; `paused` and `waited` in seconds."""

    started: float
    paused: float = 0.0
    waited: float = 0.0
    samples: int = 0
    tokens: int = 0
    flops: int | None = 0
    padding: int | None = 0

    def add(self, workload: Workload) -> None:
        self.samples += workload.samples
        self.tokens += workload.tokens
        self.flops = _sum(self.flops, workload.flops)
        self.padding = _sum(self.padding, workload.padding)


class Throughput(Callback):
    """Logs the rates of training over intervals. After fit, `trainer.callback_metrics` has the rates of the whole fit.

    - `throughput/samples_per_s`, `throughput/tokens_per_s`: over all ranks, assuming that the batches of all ranks are
      as large as those of rank zero;
    - `throughput/padding`: fraction of the tokens of rank zero that are padding, if the module counts them;
    - `throughput/data_wait`: fraction of time from the end of a batch to the start of the next: fetching and moving
      data, and saving checkpoints. On a GPU it is an upper bound, because the device may still be busy then;
    - `throughput/peak_memory_gib`: memory allocated on the CUDA device, or resident memory of the process on a CPU;
    - `throughput/mfu`: model FLOPs utilisation, FLOP/s over the peak of the device, if both are known.

    Counts come from `pl_module.workload(batch) -> Workload`. For a module without that method, the samples are the
    first axis of the batch's first tensor, and the tokens are the elements of `batch["tokens"]`.

    The time of validation, and of `off_the_clock` blocks, does not count. Neither does the first batch after a start or
    a resumption, which pays for compilation and for starting workers. The callback synchronises the device when it logs
    and around excluded blocks, not at each step.

    Example::

        trainer:
          callbacks+:
            - {class_path: Throughput, init_args: {every_n_steps: 100}}

    Args:
        every_n_steps: Optimizer steps per interval; by default the Trainer's `log_every_n_steps`.
        peak_flops: Peak FLOP/s of one device in the training precision. By default from Lightning's table, which does
            not know every device and warns then.

    Raises:
        UserError: A number is not positive; at `setup`, there are two of these callbacks.
    """

    def __init__(self, every_n_steps: int | None = None, peak_flops: float | None = None) -> None:
        check_positive(self, every_n_steps=every_n_steps, peak_flops=peak_flops)
        self.every_n_steps = every_n_steps
        self.peak_flops = peak_flops
        self._peak: float | None = None
        self._intervals = EveryNSteps(0)
        self._reset()

    def _reset(self) -> None:
        self._fit: _Tally | None = None
        self._interval: _Tally | None = None
        self._batch_ended = 0.0
        self._paused_since_batch = 0.0
        self._paused_at = 0.0
        self._pauses = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Look up the peak of the device, which warns for a device that Lightning does not know."""
        refuse_second(trainer, self)
        self._peak = self.peak_flops
        if stage == "fit" and self._peak is None and isinstance(pl_module, SupportsWorkload):
            dtype = _plugin_to_compute_dtype(trainer.precision_plugin)
            self._peak = get_available_flops(trainer.strategy.root_device, dtype)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget an earlier fit."""
        self._reset()
        self._intervals = EveryNSteps(self.every_n_steps or connected(trainer).log_every_n_steps)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Add the time since the last batch to the wait."""
        waited = time.perf_counter() - self._batch_ended - self._paused_since_batch
        for tally in self._tallies():
            tally.waited += waited

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Count the batch, and log at the end of an interval."""
        interval_ends = self._intervals.advance(trainer.global_step)
        if self._interval is None:  # the first batch
            now = _clock(trainer)
            self._fit, self._interval = _Tally(now), _Tally(now)
        else:
            workload = _workload(pl_module, batch)
            for tally in self._tallies():
                tally.add(workload)
            if interval_ends:
                log_scalars(trainer, self._metrics(trainer, self._interval))
                self._interval = _Tally(_clock(trainer))
        self._paused_since_batch = 0.0
        self._batch_ended = time.perf_counter()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the rates of the whole fit."""
        if self._fit is not None and self._fit.samples:
            keep_scalars(trainer, self._metrics(trainer, self._fit))

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self.pause(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Restart the clock."""
        self.resume(trainer)

    def pause(self, trainer: Trainer) -> None:
        """Stop the clock before work that is not training. Pauses may nest."""
        if self._pauses == 0:
            self._paused_at = _clock(trainer)
        self._pauses += 1

    def resume(self, trainer: Trainer) -> None:
        """Restart the clock after `pause`."""
        self._pauses -= 1
        if self._pauses:
            return
        paused = _clock(trainer) - self._paused_at
        self._paused_since_batch += paused
        for tally in self._tallies():
            tally.paused += paused

    def _tallies(self) -> list[_Tally]:
        return [tally for tally in (self._fit, self._interval) if tally is not None]

    def _metrics(self, trainer: Trainer, tally: _Tally) -> dict[str, float]:
        seconds = _clock(trainer) - tally.started - tally.paused
        metrics = {
            "samples_per_s": tally.samples * trainer.world_size / seconds,
            "data_wait": tally.waited / seconds,
            "peak_memory_gib": _peak_memory(trainer.strategy.root_device) / 2**30,
        }
        if tally.tokens:
            metrics["tokens_per_s"] = tally.tokens * trainer.world_size / seconds
        if tally.tokens and tally.padding is not None:
            metrics["padding"] = tally.padding / tally.tokens
        if tally.flops and self._peak:
            metrics["mfu"] = tally.flops / seconds / self._peak
        return {f"throughput/{name}": value for name, value in metrics.items()}


def _sum(total: int | None, added: int | None) -> int | None:
    return None if total is None or added is None else total + added


def _clock(trainer: Trainer) -> float:
    if trainer.strategy.root_device.type == "cuda":
        torch.cuda.synchronize(trainer.strategy.root_device)
    return time.perf_counter()


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # Linux counts in KiB, macOS in bytes.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _workload(pl_module: LightningModule, batch: object) -> Workload:
    if isinstance(pl_module, SupportsWorkload):
        return pl_module.workload(batch)
    tensors = [leaf for leaf in tree_leaves(batch) if isinstance(leaf, Tensor) and leaf.ndim]
    tokens = batch.get("tokens") if isinstance(batch, Mapping) else None
    return Workload(samples=len(tensors[0]) if tensors else 0, tokens=tokens.numel() if tokens is not None else 0)
