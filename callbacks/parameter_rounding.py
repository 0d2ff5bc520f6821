"""Parameters that are kept in a low precision."""

from typing import Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn

from callbacks.base import come_first, refuse_second
from datamodules.errors import UserError
from lightning_modules.core.sites import match_parameters

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


class ParameterRounding(Callback):
    """Rounds parameters to bf16 or fp16 after each optimizer step, as a model does that is kept in that precision.

    An update is lost if it is smaller than half of the distance to the next number: in bf16, 1/512 to 1/256 of the
    parameter. Modules refuse `trainer.precision: bf16-true` for that reason; this callback shows what it
    costs. The moments of the optimizer and the arithmetic of the step keep the trainer's precision. The callback rounds
    before the other callbacks see the step, whatever their order: averages and monitors see rounded parameters.

    Example::

        trainer:
          callbacks+:
            - class_path: ParameterRounding
              init_args: {dtype: bf16}

    Args:
        dtype: `bf16` or `fp16`.
        parameters: Name patterns, see `lightning_modules.core.sites`; all trained parameters by default.

    Raises:
        UserError: There is no pattern; at `setup`, a pattern matches nothing, or there are two of these callbacks.
    """

    def __init__(self, dtype: Literal["bf16", "fp16"] = "bf16", parameters: list[str] | None = None) -> None:
        if parameters is not None and not parameters:
            raise UserError("ParameterRounding.parameters is empty: name a parameter, or leave the key out")
        self.dtype, self.parameters = dtype, parameters
        self._matched: list[nn.Parameter] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second callback of the class, match the patterns, and become the first callback."""
        refuse_second(trainer, self)
        self._match(pl_module)
        come_first(trainer, self)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Round the initial values. A sharding strategy may have replaced the parameters since `setup`."""
        self._matched = self._match(pl_module)
        self._round()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Round what the step has changed."""
        self._round()

    def _match(self, module: LightningModule) -> list[nn.Parameter]:
        if self.parameters is None:  # frozen models stay as they are
            return [parameter for parameter in module.parameters() if parameter.requires_grad]
        return list(match_parameters(module, self.parameters, "ParameterRounding.parameters").values())

    @torch.no_grad()
    def _round(self) -> None:
        for parameter in self._matched:
            parameter.copy_(parameter.to(DTYPES[self.dtype]))
