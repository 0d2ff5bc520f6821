"""The size of the gradients of some parameters over that of others.

Shapes: S ensemble members (1 for an ordinary module).
"""

from collections.abc import Sequence

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from callbacks.base import check_positive, refuse_shared
from datamodules.errors import UserError
from lightning_modules.core.reporting import ensemble_size, report_members
from lightning_modules.core.sites import match_parameters


def mean_square(gradients: Sequence[Tensor], members: int, device: torch.device) -> Tensor:
    """Return the mean over all elements of the squared gradients of each member, [S]; NaN without gradients."""
    rows = [gradient.detach().float().reshape(members, -1) for gradient in gradients]
    if not rows:
        return torch.full([members], torch.nan, device=device)
    squares_S = torch.stack([row.square().sum(1) for row in rows]).sum(0)
    return squares_S / sum(row.shape[1] for row in rows)


class GradientRatio(Callback):
    """Logs the root mean square of the gradients of some parameters over that of other parameters.

    - `gradient/<name>`: the ratio, before gradients are clipped, at every n-th optimizer step. A parameter without a
      gradient, such as one that is frozen, does not count. One value per ensemble member.

    Example, the query offset against the phases of a phase model::

        trainer:
          callbacks+:
            - class_path: GradientRatio
              init_args: {name: offset_to_omega, parameters: ["*.angles.offset.*"], over: ["*.angles.omega.*"]}

    Args:
        name: Name of the measure.
        parameters: Name patterns of the parameters, see `lightning_modules.core.sites`.
        over: Name patterns of the parameters to compare with.
        every_n_steps: Optimizer steps between two values.

    Raises:
        UserError: A number is not positive, or there is no pattern; at `setup`, a pattern matches nothing, or two of
            these callbacks have one name.
    """

    def __init__(self, name: str, parameters: list[str], over: list[str], every_n_steps: int = 50) -> None:
        check_positive(self, every_n_steps=every_n_steps)
        for argument, patterns in (("parameters", parameters), ("over", over)):
            if not patterns:
                raise UserError(f"GradientRatio.{argument} is empty: name a parameter, such as '*.angles.omega.*'")
        self.name, self.parameters, self.over, self.every_n_steps = name, parameters, over, every_n_steps

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second callback of the same name, and patterns that match nothing."""
        refuse_shared(trainer, self, lambda ratio: [f"gradient/{ratio.name}"], "log")
        if stage == "fit":
            for patterns in (self.parameters, self.over):
                match_parameters(pl_module, patterns, "GradientRatio")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Log the ratio."""
        if (trainer.global_step + 1) % self.every_n_steps:
            return
        sizes = []
        for patterns in (self.parameters, self.over):
            values = match_parameters(pl_module, patterns).values()
            gradients = [value.grad for value in values if value.grad is not None]
            sizes.append(mean_square(gradients, ensemble_size(pl_module), pl_module.device))
        report_members(trainer, pl_module, {f"gradient/{self.name}": (sizes[0] / sizes[1]).sqrt()})
