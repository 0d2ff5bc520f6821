"""The learning-rate schedules that the lines share."""

from typing import Any, Literal

from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from transformers import get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup

from datamodules.errors import UserError


def with_schedule(
    module: LightningModule,
    optimizer: OptimizerCallable,
    warmup_steps: int,
    kind: Literal["cosine", "constant"] = "cosine",
) -> dict[str, Any]:
    """Make what `configure_optimizers` returns: a linear warm-up, then a cosine to zero or a constant.

    The cosine's length is `trainer.max_steps`, so that a run made shorter on the command line still ends its schedule.

    Raises:
        UserError: A cosine is asked for, and the trainer has no `max_steps`.
    """
    made = optimizer([parameter for parameter in module.parameters() if parameter.requires_grad])
    if kind == "constant":
        schedule = get_constant_schedule_with_warmup(made, warmup_steps)
    else:
        total = module.trainer.max_steps
        if total < 1:
            raise UserError("trainer.max_steps must say how long to train: the learning rate falls to zero there")
        schedule = get_cosine_schedule_with_warmup(made, min(warmup_steps, total // 2), total)
    return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
