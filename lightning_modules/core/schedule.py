"""The learning-rate schedules that the lines share."""

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR

from datamodules.errors import MOST, POSITIVE, UserError, check_numbers

Schedule = Literal["cosine", "linear", "constant"]
SHARE, NOT_NEGATIVE = (0, 1), (0, MOST)
BOUNDS: dict[str, tuple[float, float]] = {  # of an optimizer's arguments; others may be any finite number
    "lr": (POSITIVE, MOST),
    "betas": SHARE,
    "momentum": SHARE,
    "dampening": SHARE,
    "weight_decay": NOT_NEGATIVE,
    "eps": NOT_NEGATIVE,
}
MIXING = "Adafactor", "LBFGS"  # of any package: compute over whole tensors, which hold all members of an ensemble


def warmup(step: int, warmup_steps: int) -> float:
    """Return the factor of a linear warm-up, step / warmup_steps, and 1 after it."""
    return step / max(1, warmup_steps) if step < warmup_steps else 1.0


def warmup_cosine(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the factor of a linear warm-up and then half a cosine that ends at 0: (1 + cos(pi p)) / 2.

    p is the share of the steps after the warm-up that have passed.
    """
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return max(0.0, 0.5 * (1.0 + math.cos(math.pi * progress)))


def warmup_linear(step: int, warmup_steps: int, total_steps: int) -> float:
    """Return the factor of a linear warm-up and then a line that ends at 0."""
    if step < warmup_steps:
        return warmup(step, warmup_steps)
    return max(0.0, (total_steps - step) / max(1, total_steps - warmup_steps))


def with_schedule(
    module: LightningModule, optimizer: OptimizerCallable, warmup_steps: int, schedule: Schedule = "cosine"
) -> OptimizerLRSchedulerConfig:
    """Return what `configure_optimizers` returns: the optimizer of all trained parameters, with a schedule per step.

    A cosine or a line ends at `trainer.max_steps`, so a run that is made shorter on the command line still ends its
    schedule.

    Raises:
        UserError: The optimizer refuses its arguments, a number among them is out of range, the optimizer would mix the
            members of an ensemble, or a schedule that falls to zero has no `trainer.max_steps`.
    """
    made = _made(optimizer, [parameter for parameter in module.parameters() if parameter.requires_grad])
    if getattr(module, "ensemble", 1) > 1 and (name := type(made).__name__) in MIXING:
        raise UserError(f"model.optimizer: {name} mixes the members of an ensemble: use AdamW, or set model.ensemble 1")
    factor: Callable[[int], float]
    if schedule == "constant":
        factor = partial(warmup, warmup_steps=warmup_steps)
    else:
        total = module.trainer.max_steps
        if total < 1:
            raise UserError("trainer.max_steps must be set: the learning rate falls to zero at that step")
        fall = warmup_cosine if schedule == "cosine" else warmup_linear
        factor = partial(fall, warmup_steps=min(warmup_steps, total // 2), total_steps=total)
    return {"optimizer": made, "lr_scheduler": {"scheduler": LambdaLR(made, factor), "interval": "step"}}


def _made(optimizer: OptimizerCallable, parameters: list[Parameter]) -> torch.optim.Optimizer:
    try:
        made = optimizer(parameters)
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        raise UserError(f"model.optimizer: {error}") from error
    if isinstance(made, torch.optim.SparseAdam):
        raise UserError("model.optimizer: SparseAdam takes sparse gradients only, and those here are dense: use Adam")
    for group in made.param_groups:
        _check_arguments({name: value for name, value in group.items() if name != "params"})
    return made


def _check_arguments(arguments: Mapping[str, object]) -> None:
    """Check the numbers among an optimizer's arguments; torch itself lets infinity pass, and SGD any momentum."""
    for name, value in arguments.items():
        for number in value if isinstance(value, tuple | list) else [value]:
            if isinstance(number, torch.Tensor) and number.numel() == 1:
                number = number.item()
            if isinstance(number, int | float):
                check_numbers("model.optimizer", *BOUNDS.get(name, (-MOST, MOST)), **{name: number})
