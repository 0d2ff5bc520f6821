"""Forward hooks of callbacks: they come off when a run ends, act in some stages, and change the output of a module."""

from collections.abc import Callable
from typing import Any, Literal, ParamSpec, TypeVar, cast

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import RunningStage
from torch import Tensor
from torch.utils.hooks import RemovableHandle

from callbacks.base import ReleasingCallback
from datamodules.errors import UserError
from lightning_modules.core.seeding import check_seed, seeded_generator

STAGES = {
    RunningStage.TRAINING: "fit",
    RunningStage.SANITY_CHECKING: "validate",
    RunningStage.VALIDATING: "validate",
    RunningStage.TESTING: "test",
    RunningStage.PREDICTING: "predict",
}
Stages = list[Literal["fit", "validate", "test", "predict"]]
P = ParamSpec("P")
R = TypeVar("R")


def eager(hook: Callable[P, R], is_idle: Callable[[], bool] | None = None) -> Callable[P, R]:
    """Exclude a hook from compilation, because it depends on the stage and the step.

    A compiled module leaves its graph to call the hook.

    Args:
        hook: The hook.
        is_idle: Tells that the hook has nothing to do in this step, so that the step may be a CUDA graph.
    """
    outside: Any = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]  # torch has no types
    outside.is_idle = is_idle
    return cast(Callable[P, R], outside)


def first_tensor(output: object, site: str) -> Tensor:
    """Return the output of a module, or the first element if the module returned a tuple.

    Raises:
        UserError: That is not a tensor.
    """
    x = output[0] if isinstance(output, tuple) and output else output
    if not isinstance(x, Tensor):
        raise UserError(f"Modules at {site!r} must return a tensor or a tuple that begins with one, not {type(x)}.")
    return x


def replace_first(output: object, site: str, change: Callable[[Tensor], Tensor]) -> object:
    """Return the output of a module with its first tensor x replaced by `change(x)`, computed in at least fp32."""
    x = first_tensor(output, site)
    changed = change(x.to(torch.promote_types(x.dtype, torch.float32))).to(x.dtype)
    return (changed, *output[1:]) if isinstance(output, tuple) else changed


class HookedCallback(ReleasingCallback):
    """A callback whose forward hooks, kept in `_handles`, come off when a run ends or fails."""

    def __init__(self) -> None:
        self._handles: list[RemovableHandle] = []

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []


class StageCallback(HookedCallback):
    """A callback that does the same at the start and at the end of the batches of every stage."""

    def on_stage_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Do nothing; called at the start of every batch of every stage."""

    def on_stage_batch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Do nothing; called at the end of every batch of every stage."""

    # Lightning calls its hooks with positional arguments.

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any, **_: Any) -> None:
        """Call `on_stage_batch_start`."""
        self.on_stage_batch_start(trainer, pl_module, *batch)

    def on_validation_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any, **_: Any) -> None:
        """Call `on_stage_batch_start`."""
        self.on_stage_batch_start(trainer, pl_module, *batch)

    def on_test_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any, **_: Any) -> None:
        """Call `on_stage_batch_start`."""
        self.on_stage_batch_start(trainer, pl_module, *batch)

    def on_predict_batch_start(self, trainer: Trainer, pl_module: LightningModule, *batch: Any, **_: Any) -> None:
        """Call `on_stage_batch_start`."""
        self.on_stage_batch_start(trainer, pl_module, *batch)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object, **__: object) -> None:
        """Call `on_stage_batch_end`."""
        self.on_stage_batch_end(trainer, pl_module)

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object, **__: object) -> None:
        """Call `on_stage_batch_end`."""
        self.on_stage_batch_end(trainer, pl_module)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object, **__: object) -> None:
        """Call `on_stage_batch_end`."""
        self.on_stage_batch_end(trainer, pl_module)

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object, **__: object) -> None:
        """Call `on_stage_batch_end`."""
        self.on_stage_batch_end(trainer, pl_module)


class InterveningCallback(StageCallback):
    """A callback whose hooks act in some stages, with random numbers that depend on the step.

    Args:
        during: The stages in which the hooks act; None for those of `default`.
        default: The default of `during`.
        seed: Seed of the random numbers.

    Raises:
        UserError: `during` is empty, or the seed is negative or too large.
    """

    def __init__(self, during: Stages | None, default: Stages, seed: int) -> None:
        super().__init__()
        name = type(self).__name__
        if during is not None and not during:
            raise UserError(f"{name}: `during` names no stage.")
        check_seed(seed, f"{name}: `seed`")
        self.during = during or default
        self.seed = seed
        self._step: tuple[int, ...] = ()  # identifies the step: the same in a repeated or resumed run

    def _acts(self, trainer: Trainer) -> bool:
        """Return whether the hooks act in the trainer's present stage."""
        stage = trainer.state.stage
        return stage is not None and STAGES.get(stage) in self.during

    def _generator(self, x: Tensor, index: int) -> torch.Generator:
        """Return the random generator of the present step for module number `index`, on the device of x.

        Every call gives the same numbers again, because a checkpointed backward repeats the forward.
        """
        return seeded_generator(self.seed, index, *self._step, device=x.device)

    def on_stage_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Note the step."""
        self._step = (trainer.global_rank, trainer.global_step, batch_idx, dataloader_idx)
