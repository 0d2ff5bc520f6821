"""The learning-rate schedule that every line shares."""

from typing import Any

from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from transformers import get_cosine_schedule_with_warmup


def with_cosine_schedule(module: LightningModule, optimizer: OptimizerCallable, warmup_steps: int) -> dict[str, Any]:
    """Make what `configure_optimizers` returns: linear warm-up, then a cosine to zero at `trainer.max_steps`.

    The length comes from the trainer, so that a run made shorter on the command line still ends its schedule.

    Raises:
        ValueError: The trainer has no `max_steps`.
    """
    total = module.trainer.max_steps
    if total < 1:
        raise ValueError("trainer.max_steps must say how long to train: the learning rate falls to zero there")
    made = optimizer([parameter for parameter in module.parameters() if parameter.requires_grad])
    schedule = get_cosine_schedule_with_warmup(made, min(warmup_steps, total // 2), total)
    return {"optimizer": made, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
