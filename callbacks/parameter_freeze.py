"""Parameters that stop moving, from the start or from a step on."""

from lightning.pytorch import LightningModule, Trainer
from torch import nn

from callbacks.base import ReleasingCallback
from datamodules.errors import UserError
from lightning_modules.core.sites import match_parameters


class ParameterFreeze(ReleasingCallback):
    """Keeps parameters bit-identical from an optimizer step on.

    A frozen parameter is left out of the gradient norm, of weight decay and of the optimizer's state: its moments are
    neither used nor updated, so they too stay as they were. Nothing is stored in checkpoints: whether a parameter is
    frozen follows from the restored step, so a resumed run does what the uninterrupted one does.

    With `at_step=0` the parameters do not require gradients during fit, and cost nothing. A later freeze cannot do that
    (DDP fixes at its construction which gradients it waits for, and the optimizer's state would go); it discards their
    gradients right after each backward instead, which optimizers take as "skip this parameter". The price is that these
    gradients are still computed, and reduced over the ranks.

    An average of the weights (EMA) of a parameter frozen later converges to its value; it is not frozen itself.

    Args:
        parameters: Name patterns, see `lightning_modules.core.sites`; whole parameters only.
        at_step: The number of optimizer steps that these parameters take before they freeze.

    Raises:
        UserError: At `setup`, if a pattern matches nothing, or nothing is left to train from step 0 on; at once, if
            `at_step` is negative.
    """

    def __init__(self, parameters: list[str], at_step: int = 0) -> None:
        if at_step < 0:
            raise UserError(f"`at_step` counts optimizer steps from 0, got {at_step}.")
        self.parameters = parameters
        self.at_step = at_step
        self._matched: list[nn.Parameter] = []
        self._to_release: list[nn.Parameter] = []

    @property
    def state_key(self) -> str:
        """Distinct for two freezes in one trainer."""
        return self._generate_state_key(parameters=self.parameters, at_step=self.at_step)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Resolves the patterns, and freezes at once where `at_step` is 0: before DDP and the optimizer are made."""
        if stage != "fit":
            return
        matched = match_parameters(pl_module, self.parameters).values()
        if self.at_step == 0:
            self._to_release = [parameter for parameter in matched if parameter.requires_grad]
            for parameter in self._to_release:
                parameter.requires_grad_(False)
            if not any(parameter.requires_grad for parameter in pl_module.parameters()):
                raise UserError(f"ParameterFreeze: {self.parameters} at step 0 leaves nothing to train.")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Resolves again: a sharding strategy may have replaced the parameter objects since `setup`."""
        self._matched = list(match_parameters(pl_module, self.parameters).values())

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Discards the gradients: after every backward, hence before unscaling, clipping, norms and the step."""
        if trainer.global_step >= self.at_step:
            for parameter in self._matched:
                parameter.grad = None

    def _release(self) -> None:
        # After fit they require gradients as before
        for parameter in self._to_release:
            parameter.requires_grad_(True)
        self._to_release = []
        self._matched = []
