"""What callbacks that reach into a module have in common."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from datamodules.errors import UserError

STAGES = {
    RunningStage.TRAINING: "fit",
    RunningStage.SANITY_CHECKING: "validate",
    RunningStage.VALIDATING: "validate",
    RunningStage.TESTING: "test",
    RunningStage.PREDICTING: "predict",
}
Stages = list[Literal["fit", "validate", "test", "predict"]]


class ReleasingCallback(Callback, ABC):
    """A callback that takes back what it did to the module when a run ends or fails."""

    @abstractmethod
    def _release(self) -> None:
        """Take it back; may be called twice."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Takes it back."""
        self._release()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Takes it back here too: Lightning skips `teardown` when a run fails."""
        self._release()


class HookedCallback(ReleasingCallback):
    """A callback whose forward hooks, kept in `_handles`, come off when a run ends or fails."""

    _handles: Sequence[RemovableHandle] = ()

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class StagedCallback(HookedCallback):
    """A callback whose hooks act in some stages, with random numbers of the step in which they act.

    Args:
        during: The stages; None for those of `default`.
        default: As above.
        seed: Of the random numbers.

    Raises:
        UserError: If `during` is empty.
    """

    def __init__(self, during: Stages | None, default: Stages, seed: int) -> None:
        if during is not None and not during:
            raise UserError(f"{type(self).__name__}: `during` names no stage.")
        self.during = during or default
        self.seed = seed
        self._handles: list[RemovableHandle] = []
        self._step: tuple[int, ...] = ()  # what it is known by: the same in a repeated or resumed run

    def _acts(self, trainer: Trainer) -> bool:
        return STAGES.get(trainer.state.stage) in self.during

    def _generator(self, x: Tensor, index: int) -> torch.Generator:
        # One seed a step and module rather than one stream, for a checkpointed backward repeats the forward.
        return torch.Generator(x.device).manual_seed(hash((self.seed, index, *self._step)) % 2**63)

    def _begin(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, loader: int = 0) -> None:
        self._step = (trainer.global_rank, trainer.global_step, batch_idx, loader)

    on_train_batch_start = on_validation_batch_start = on_test_batch_start = on_predict_batch_start = _begin


def first_tensor(output: Any, site: str) -> Tensor:
    """A module's output, or the first element of the tuple that it returned."""
    x = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(x, Tensor):
        raise UserError(f"Modules at {site!r} must return a tensor or a tuple that begins with one, not {type(x)}.")
    return x


def replace_first(output: Any, site: str, change: Callable[[Tensor], Tensor]) -> Any:
    """A module's output with its first tensor x replaced by `change(x)`, which works in at least fp32."""
    x = first_tensor(output, site)
    changed = change(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
    return changed if isinstance(output, Tensor) else (changed, *output[1:])
