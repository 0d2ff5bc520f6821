"""Parameters that stop changing, from the start of training or from a later step on."""

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from callbacks.base import ReleasingCallback
from datamodules.errors import UserError, check_numbers
from lightning_modules.core.sites import match_parameters


class ParameterFreeze(ReleasingCallback):
    """Keeps parameters bit-identical from an optimizer step on.

    A frozen parameter has no part in the gradient norm or in weight decay, and the optimizer neither uses nor updates
    its moments. Checkpoints hold nothing of this callback: the restored step says whether a parameter is frozen, so a
    resumed run does what the uninterrupted run does.

    With `at_step=0` the parameters do not require gradients during fit, and cost nothing. A later freeze cannot do
    that: DDP decides when it is constructed which gradients it waits for, and the optimizer's state would be lost. It
    discards the gradients right after each backward instead, and optimizers skip parameters without a gradient. The
    gradients are still computed, and reduced over the ranks.

    An average of the weights (EMA) is not frozen itself; for a parameter that freezes later it converges to the frozen
    value.

    Example::

        trainer:
          callbacks+:
            - class_path: ParameterFreeze
              init_args: {parameters: ["*.attn.q_proj.*", "*.attn.k_proj.*"], at_step: 4000}

    Args:
        parameters: Name patterns, see `lightning_modules.core.sites`.
        at_step: Number of optimizer steps that the parameters take before they freeze.

    Raises:
        UserError: `at_step` is negative, or there is no pattern; at `setup`, a pattern matches nothing, or no parameter
            is left to train from step 0 on.
    """

    def __init__(self, parameters: list[str], at_step: int = 0) -> None:
        check_numbers("ParameterFreeze", 0, at_step=at_step)
        if not parameters:
            raise UserError("ParameterFreeze: `parameters` names no parameter.")
        self.parameters = parameters
        self.at_step = at_step
        self._matched: list[nn.Parameter] = []
        self._without_gradient: list[nn.Parameter] = []

    @property
    def state_key(self) -> str:
        """Return a key that differs between two freezes of one trainer."""
        return self._generate_state_key(parameters=self.parameters, at_step=self.at_step)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Match the patterns, and freeze now where `at_step` is 0: before DDP and the optimizer are made."""
        if stage != "fit":
            return
        matched = match_parameters(pl_module, self.parameters, "ParameterFreeze.parameters").values()
        if self.at_step == 0:
            self._without_gradient = [parameter for parameter in matched if parameter.requires_grad]
            for parameter in self._without_gradient:
                parameter.requires_grad_(False)
            if not any(parameter.requires_grad for parameter in pl_module.parameters()):
                raise UserError(f"ParameterFreeze: {self.parameters} at step 0 leaves nothing to train.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Match again: a sharding strategy may have replaced the parameter objects since `setup`."""
        self._matched = list(match_parameters(pl_module, self.parameters).values())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discard the gradients: after every backward, hence before unscaling, clipping, norms and the step."""
        if trainer.global_step >= self.at_step:
            for parameter in self._matched:
                parameter.grad = None

    def _release(self) -> None:
        for parameter in self._without_gradient:
            parameter.requires_grad_(True)
        self._without_gradient = []
        self._matched = []
