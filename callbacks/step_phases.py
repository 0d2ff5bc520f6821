"""Where the time of a training step goes."""

import time
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from callbacks.base import EveryNSteps, check_positive, come_first, refuse_second
from callbacks.hooks import HookedCallback, eager
from lightning_modules.core.contracts import connected
from lightning_modules.core.reporting import keep_scalars, log_scalars
from lightning_modules.telepathy.training import BridgeTraining

Mark = tuple[str, Any]  # the phase that ends, and the time: an event of the GPU, or seconds


def spent(marks: Sequence[Mark]) -> Counter[str]:
    """Return the milliseconds of each phase, after a wait for the last mark."""
    times: Counter[str] = Counter()
    for (_, begin), (phase, end) in pairwise(marks):
        if isinstance(end, float):
            times[phase] += 1e3 * (end - begin)
        else:
            end.synchronize()
            times[phase] += begin.elapsed_time(end)
    return times


class StepPhases(HookedCallback):
    """Logs the milliseconds of the phases of a training step, every n steps; after a fit, their means over these steps.

    - `phases/source_ms`, `phases/bridge_ms`, `phases/target_ms`: the forward of a bridge's parts, and
      `phases/losses_ms`: what follows up to the loss. Other modules have `phases/forward_ms` in place of the four;
    - `phases/backward_ms`;
    - `phases/optimizer_ms`: clipping and the optimizer's step.

    Events on the GPU mark the ends of phases, so only a step that is logged waits for the device. Such a step does not
    run as a CUDA graph.

    Example::

        trainer:
          callbacks+:
            - {class_path: StepPhases, init_args: {every_n_steps: 200}}

    Args:
        every_n_steps: Optimizer steps from one measurement to the next; by default the Trainer's `log_every_n_steps`.

    Raises:
        UserError: A number is not positive; at `setup`, there are two of these callbacks.
    """

    def __init__(self, every_n_steps: int | None = None) -> None:
        super().__init__()
        check_positive(self, every_n_steps=every_n_steps)
        self.every_n_steps = every_n_steps
        self._checks = EveryNSteps(0)
        self._has_parts = self._on_gpu = self._armed = False
        self._marks: list[Mark] = []
        self._sums: Counter[str] = Counter()
        self._steps = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch the parts of a module that trains a bridge; become the first callback.

        What other callbacks do at the end of a batch, such as an evaluation, is then no part of the step.
        """
        refuse_second(trainer, self)
        come_first(trainer, self)
        if stage == "fit" and isinstance(pl_module, BridgeTraining):
            self._has_parts = True
            self._handles = [
                pl_module.bridge.register_forward_pre_hook(self._ends("source")),
                pl_module.target.model.register_forward_pre_hook(self._ends("bridge")),
                pl_module.target.model.register_forward_hook(self._ends("target")),
            ]

    def _ends(self, phase: str) -> Callable[..., None]:
        """Return a hook that marks the end of a phase in the first call of a step; later calls belong to the losses."""

        def mark(*_: object) -> None:
            if phase not in dict(self._marks):
                self._mark(phase)

        return eager(mark, lambda: not self._armed)

    def _mark(self, phase: str) -> None:
        if not self._armed:
            return
        mark: Any = time.perf_counter()
        if self._on_gpu:
            event: Any = torch.cuda.Event
            mark = event(enable_timing=True)
            mark.record()
        self._marks.append((phase, mark))

    def is_measured(self, trainer: Trainer, batch_idx: int) -> bool:
        """Return whether the step that begins is measured."""
        return self._checks.due(trainer.global_step + 1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from the step at which the fit starts or resumes."""
        self._checks = EveryNSteps(self.every_n_steps or connected(trainer).log_every_n_steps)
        self._checks.start(trainer.global_step)
        self._on_gpu = trainer.strategy.root_device.type == "cuda"
        self._sums, self._steps = Counter(), 0

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int) -> None:
        """Start the clock of a step that is measured."""
        self._marks, self._armed = [], self.is_measured(trainer, batch_idx)
        self._mark("between")

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """End the forward."""
        self._mark("losses" if self._has_parts else "forward")

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the backward."""
        self._mark("backward")

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """End the step, and log its phases if it was measured and the optimizer has made its step."""
        self._mark("optimizer")
        self._armed = False
        if self._marks and self._checks.advance(trainer.global_step):
            phases = spent(self._marks)
            self._sums.update(phases)
            self._steps += 1
            log_scalars(trainer, {f"phases/{phase}_ms": value for phase, value in phases.items()})

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the means."""
        keep_scalars(trainer, {f"phases/{phase}_ms": total / self._steps for phase, total in self._sums.items()})
