"""A test of the parameters that had the lowest held-out loss.

Shapes: S ensemble members (1 for an ordinary module).
"""

from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from callbacks.base import ReleasingCallback
from callbacks.held_out import validated_weights
from datamodules.errors import UserError
from lightning_modules.core.contracts import HasMembers
from lightning_modules.core.reporting import ensemble_size, report_members

LOSS = "validation/loss"


class BestValidation(ReleasingCallback):
    """Tests the trained parameters of the validation with the lowest `validation/loss`; each member has its own.

    - `validation/best_step`: the step of that validation, or NaN. One value per ensemble member.

    It keeps a copy of the parameters, on the device and in each checkpoint. The copy takes the place of the model's own
    parameters from the start of a test to its end. Training, validation, `generate` and the weights in a checkpoint are
    those of the last step. Of a run that averages its weights (EMA), the copy is of the average, which is what its
    validations measure. A test with `--ckpt_path` finds the copy in the checkpoint. A member whose held-out loss was
    never finite is tested at the last step, with a warning. The validation text must not be the test text, or the test
    would be too good.

    Example::

        trainer:
          callbacks+: BestValidation

    Raises:
        UserError: At a validation, the module has no `validation/loss`.
    """

    def __init__(self) -> None:
        self._lowest_S: Tensor | None = None
        self._step_S = torch.zeros(0)
        self._best: dict[str, Tensor] = {}
        self._own: dict[nn.Parameter, Tensor] = {}  # during a test: parameter -> its own value

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin each fit without a copy."""
        if stage == "fit":
            self._lowest_S, self._best = None, {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the parameters of the members whose loss has not been as low before."""
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        loss_S = _losses(trainer, pl_module)
        if self._lowest_S is None:
            self._lowest_S, self._step_S = torch.full_like(loss_S, torch.inf), torch.full_like(loss_S, torch.nan)
        better_S = loss_S < self._lowest_S  # False for NaN
        self._lowest_S = torch.where(better_S, loss_S, self._lowest_S)
        self._step_S = torch.where(better_S, float(trainer.global_step), self._step_S)
        with validated_weights(trainer, pl_module):
            self._copy(pl_module, better_S)
        report_members(trainer, pl_module, {"validation/best_step": self._step_S})

    def _copy(self, module: LightningModule, better_S: Tensor) -> None:
        for name, parameter in _trained(module).items():
            value = parameter.detach()
            self._best[name] = _choose(better_S, value, self._best.get(name, value))

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Put the copy in place."""
        if self._lowest_S is None:
            rank_zero_warn("BestValidation has no copy, because the fit had no validation: the last step is tested")
            return
        measured_S = self._lowest_S < torch.inf
        if never := int((~measured_S).sum()):
            whose = f"{never} of {len(measured_S)} members" if len(measured_S) > 1 else "the model"
            rank_zero_warn(f"BestValidation: no held-out loss of {whose} was finite: the last step is tested")
        for name, parameter in _trained(pl_module).items():
            if name in self._best:
                self._own[parameter] = parameter.detach().clone()
                parameter.data.copy_(_choose(measured_S, self._best[name], parameter.detach()))

    def _release(self) -> None:
        for parameter, value in self._own.items():
            parameter.data.copy_(value)
        self._own = {}

    def state_dict(self) -> dict[str, Any]:
        """Return the copy, with its losses and steps."""
        return {"lowest": self._lowest_S, "step": self._step_S, "best": self._best}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the copy of a checkpoint."""
        self._lowest_S, self._step_S, self._best = (state_dict[name] for name in ("lowest", "step", "best"))


def _trained(module: LightningModule) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _choose(first_S: Tensor, value: Tensor, other: Tensor) -> Tensor:
    """Return the value of the members that are named, and the other value of the rest."""
    first = first_S.view(-1, *[1] * (value.dim() - 1)) if len(first_S) > 1 else first_S[0]
    return torch.where(first.to(value.device), value, other.to(value.device))


def _losses(trainer: Trainer, module: LightningModule) -> Tensor:
    """Return the held-out loss of each member, on the CPU."""
    if LOSS not in trainer.callback_metrics:
        raise UserError(f"BestValidation needs {LOSS}, and {type(module).__name__} does not log it: take it out")
    own = module.members if ensemble_size(module) > 1 and isinstance(module, HasMembers) else trainer.callback_metrics
    return own[LOSS].detach().float().cpu().reshape(-1)
