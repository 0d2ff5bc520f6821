"""The end of a run whose loss or weights are no longer finite.

Shapes: S ensemble members.
"""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor

from lightning_modules.core.contracts import HasMembers, HasNonfinitePolicy, connected
from lightning_modules.core.reporting import ensemble_size


class Diverged(Exception):
    """Training has diverged.

    Attributes:
        step: The optimizer step at which it was seen first.
        reason: What is not finite, in words.
    """

    def __init__(self, step: int, reason: str) -> None:
        super().__init__(f"the run has diverged: {reason} since step {step}")
        self.step, self.reason = step, reason


class Divergence(Callback):
    """Ends a run with `Diverged` if the loss, a held-out loss (`validation/loss`) or a trained parameter is not finite.

    The loss of every step is tested on the device; the result is read every `trainer.log_every_n_steps` steps, at
    validations and at the end, so that no step waits for the device. Parameters are tested before each checkpoint, so
    that no checkpoint with such weights is written. An ensemble has diverged when all of its members have. A module
    with `on_nonfinite="continue"` is left alone. The command line adds this callback to every run.

    Example::

        model:
          init_args: {on_nonfinite: continue}
    """

    def __init__(self) -> None:
        self._first: Tensor | None = None  # the first step with such a loss, -1 before it; on the device

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin with no such step."""
        self._first = torch.tensor(-1, device=pl_module.device)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Test the loss, and read the result if this step is logged."""
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if stops(pl_module) and isinstance(loss, Tensor):
            assert self._first is not None  # training has started
            diverged = ~_by_member(pl_module, "train/loss", loss).isfinite().any()
            self._first = torch.where(diverged & (self._first < 0), trainer.global_step, self._first)
            every = connected(trainer).log_every_n_steps  # 0 in barebones mode
            if every and trainer.global_step % every == 0:
                self._check_loss(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the result, and test the held-out losses."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking or not stops(pl_module):
            return
        self._check_loss(trainer)
        for name, value in trainer.callback_metrics.items():
            # Not what a memory loses, such as `orthogonal_loss`, which is NaN where there is nothing to measure
            is_loss = name.startswith("validation/") and name.endswith("/loss")
            if is_loss and not _by_member(pl_module, name, value).isfinite().any():
                raise Diverged(trainer.global_step, f"{name} is not finite")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the result of the last steps, and test the trained parameters."""
        if stops(pl_module):
            self._check_loss(trainer)
            self._check_weights(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Test the trained parameters; if one is not finite, the checkpoint is not written."""
        if stops(pl_module) and trainer.state.fn == TrainerFn.FITTING:
            self._check_loss(trainer)
            self._check_weights(trainer, pl_module)

    def _check_loss(self, trainer: Trainer) -> None:
        if self._first is None:
            return
        first = int(trainer.strategy.reduce(self._first, reduce_op="max"))
        if first >= 0:
            raise Diverged(first, "the loss is not finite")

    def _check_weights(self, trainer: Trainer, module: LightningModule) -> None:
        name = nonfinite_parameter(module)
        if trainer.strategy.reduce_boolean_decision(name is not None, all=False):  # ranks may hold parts of them
            raise Diverged(trainer.global_step, f"{name or 'a parameter'} is not finite")


def _by_member(module: LightningModule, name: str, value: Tensor) -> Tensor:
    """Return the values of an ensemble's members, instead of their sum or mean; `value` for an ordinary module."""
    if ensemble_size(module) > 1 and isinstance(module, HasMembers):
        return module.members.get(name, value)
    return value.detach()


def stops(module: LightningModule) -> bool:
    """Return whether a run of the module ends when it diverges."""
    return not isinstance(module, HasNonfinitePolicy) or module.on_nonfinite == "stop"


def nonfinite_parameter(module: LightningModule) -> str | None:
    """Return the name of a trained parameter that is not finite, in all members of an ensemble; None if all are."""
    members = ensemble_size(module)
    named = [(name, value.detach()) for name, value in module.named_parameters() if value.requires_grad]
    if not named:
        return None
    finite_NS = torch.stack([value.reshape(members, -1).isfinite().all(1) for _, value in named])
    if finite_NS.all(0).any():
        return None
    first = int((~finite_NS).any(1).int().argmax())
    return named[first][0]
