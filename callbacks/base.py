"""What callbacks share: checks of arguments, steps at which they act, decisions of all ranks, release after a run."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TypeVar, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from datamodules.errors import MOST, UserError
from lightning_modules.core.contracts import connected

C = TypeVar("C", bound=Callback)

# Checks


def check_positive(callback: Callback, **numbers: float | None) -> None:
    """Check arguments of a callback that count something or are a size; None stands for a default and passes.

    Raises:
        UserError: A number is not positive.
    """
    for name, number in numbers.items():
        if number is not None and not 0 < number <= MOST:
            at_least = "at least 1" if isinstance(number, int) else "positive"
            raise UserError(f"{type(callback).__name__}: `{name}` must be {at_least}, got {number}.")


def refuse_second(trainer: Trainer, callback: Callback) -> None:
    """Refuse a second callback of one class, whose measures would have the same names.

    Raises:
        UserError: The trainer has two.
    """
    if any(isinstance(other, type(callback)) and other is not callback for other in connected(trainer).callbacks):
        raise UserError(f"Two {type(callback).__name__} callbacks would log under one name; keep one.")


def refuse_shared(trainer: Trainer, callback: C, owned: Callable[[C], Iterable[str]], what: str) -> None:
    """Refuse a second callback of one class that has something in common with this one.

    Args:
        trainer: The trainer.
        callback: The callback.
        owned: Returns the names of what must belong to one callback only.
        what: What both would do with a name, such as `log`.

    Raises:
        UserError: The trainer has two of the class that share a name.
    """
    callbacks = connected(trainer).callbacks
    for other in [other for other in callbacks if isinstance(other, type(callback)) and other is not callback]:
        if both := sorted(set(owned(callback)) & set(owned(other))):
            raise UserError(f"Two {type(callback).__name__} callbacks would {what} {both[0]!r}; keep one.")


# Order


def come_first(trainer: Trainer, callback: Callback) -> None:
    """Let a callback act before all others of the trainer, whatever their order in the config."""
    others = [other for other in connected(trainer).callbacks if other is not callback]
    connected(trainer).callbacks = [callback, *others]


# Steps


class EveryNSteps:
    """Decides at which optimizer steps a callback acts that acts every n steps: at multiples of n.

    The trainer's step may jump, as under several optimizers. A jump over a multiple of n counts as reaching it.

    Args:
        n: Optimizer steps; 0 for never.

    Attributes:
        last: The step up to which steps were counted.
    """

    def __init__(self, n: int) -> None:
        self.n = n
        self.last = 0

    def start(self, step: int) -> None:
        """Count from `step`, at which a fit starts or resumes."""
        self.last = step

    def due(self, step: int) -> bool:
        """Return whether a multiple of n is above the last step and at most `step`."""
        return self.n > 0 and step // self.n > self.last // self.n

    def advance(self, step: int) -> bool:
        """Make `step` the last step, and return whether it was due."""
        due, self.last = self.due(step), step
        return due


class CommonDecision:
    """A decision between yes and no that all ranks take at the same training step.

    One process decides at once, without the device. Several ranks ask one another only every few steps, because each
    question waits for the device: as many steps apart as fit into `seconds` on the slowest rank.

    Args:
        seconds: Time between two questions, about.
    """

    def __init__(self, seconds: float = 2.0) -> None:
        self.seconds = seconds
        self._waited, self._every, self._asked = 0, 1, time.monotonic()

    def __call__(self, trainer: Trainer, wish: bool) -> bool:
        """Return whether any rank wishes it; every rank calls this after every optimizer step."""
        if trainer.world_size == 1:
            return wish
        self._waited += 1
        if self._waited < self._every:
            return False
        now = time.monotonic()
        per_step = (now - self._asked) / self._waited
        parts_2 = torch.tensor([float(wish), per_step], dtype=torch.float64, device=trainer.strategy.root_device)
        any_wish, slowest = cast(Tensor, trainer.strategy.reduce(parts_2, reduce_op="max")).tolist()
        self._waited, self._asked, self._every = 0, now, max(1, int(self.seconds / max(slowest, 1e-6)))
        return bool(any_wish)


# What ends with the run


class ReleasingCallback(Callback, ABC):
    """A callback that undoes its changes to the module when a run ends or fails."""

    @abstractmethod
    def _release(self) -> None:
        """Undo the changes; may be called twice."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo the changes."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Undo the changes here too, because Lightning skips `teardown` when a run fails.

        The callbacks behind this one undo theirs first: they have kept what this one had put in place.
        """
        for callback in reversed(connected(trainer).callbacks):
            if isinstance(callback, ReleasingCallback):
                callback._release()
