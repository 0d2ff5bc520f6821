"""Training steps as CUDA graphs: one launch for the forward and one for the backward, in place of hundreds."""

from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from datamodules.errors import UserError

HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")  # of nn.Module
MOST_SHAPES = 16  # that are recorded: each keeps its outputs and gradients in memory

Step = Callable[..., tuple[Tensor, ...]]


def obstacle(trainer: Trainer) -> str | None:
    """Return why a fit cannot use CUDA graphs, or None."""
    if trainer.world_size > 1:
        return "there are several processes"
    if trainer.accumulate_grad_batches > 1:
        return "trainer.accumulate_grad_batches is above 1"  # a replay would overwrite the gradients to add to
    return None


def records(module: LightningModule, wanted: bool, why_not: Callable[[Trainer], str | None] = obstacle) -> bool:
    """Return whether a fit that begins records its steps; a warning says why it does not where that is asked for."""
    if not wanted or module.device.type != "cuda":
        return False
    if reason := why_not(module.trainer):
        rank_zero_warn(f"model.cuda_graphs is ignored: {reason}")
    return reason is None


def is_watched(module: nn.Module) -> bool:
    """Return whether a hook of the forward or the backward of a module has something to do in this step.

    A hook that often has nothing to do says so by an attribute `is_idle`, a function without arguments.
    """
    hooks = (hook for part in module.modules() for name in HOOKS for hook in getattr(part, name).values())
    return any(not (idle := getattr(hook, "is_idle", None)) or not idle() for hook in hooks)


class GraphedStep:
    """A training step with its gradients, recorded once for each shape of a batch and then replayed.

    The kernels are those of an ordinary step, so the numbers are too. With mixed precision they differ where a weight
    is used twice: its gradients are added in fp32, and those of an ordinary step in the lower precision. A replay
    overwrites the outputs of the one before, except the first. The step runs without a record while a hook watches it,
    and for further shapes after `MOST_SHAPES`. A parameter that is moved or frozen leads to a new record.

    Args:
        module: The module whose trained parameters get gradients.
        step: Maps the tensors of a batch to a loss, or a loss per ensemble member, and to other outputs.
        variant: Returns what else the step depends on; there is a record for each of its values.
    """

    def __init__(self, module: nn.Module, step: Step, variant: Callable[[], Hashable] = lambda: None):
        self.module, self.step, self.variant = module, step, variant
        self.pool = torch.cuda.graph_pool_handle()
        self.recorded: dict[Hashable, Any] = {}

    def __call__(self, *batch: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of the step."""
        if is_watched(self.module):
            return self.step(*batch)
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        shapes = ((x.shape, x.dtype) for x in batch)
        key = self.variant(), self.module.training, *shapes, *(parameter.data_ptr() for parameter in trained)
        if key not in self.recorded:
            if len(self.recorded) == MOST_SHAPES:
                return self.step(*batch)
            self.recorded[key] = self._record(_Inputs(trained, self.step), batch)
        first, *others = self.recorded[key](*batch)
        return first.clone(), *others

    def _record(self, step: nn.Module, batch: tuple[Tensor, ...]) -> Any:
        inputs, device = tuple(x.clone() for x in batch), batch[0].device  # a replay reads its batch from here
        # The nodes that add up gradients belong to the stream of the record, and PyTorch warns at the first replay
        torch.autograd.graph.set_warn_on_accumulate_grad_stream_mismatch(False)
        mixed, kind = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
        try:
            # The passes before the record draw random numbers that an ordinary step does not draw
            with torch.random.fork_rng([device]), torch.autocast("cuda", kind, mixed, cache_enabled=False):
                return torch.cuda.make_graphed_callables(step, inputs, allow_unused_input=True, pool=self.pool)
        except RuntimeError as error:
            if "captur" not in str(error):
                raise
            reason = str(error).partition("\n")[0]
            raise UserError(f"model.cuda_graphs must be false: the step cannot be recorded: {reason}") from error


class _Inputs(nn.Module):
    """A step as a module with given parameters, the inputs for which a graph returns gradients."""

    def __init__(self, trained: list[nn.Parameter], step: Step):
        super().__init__()
        self.trained, self.step = tuple(trained), step

    def parameters(self, recurse: bool = True) -> Iterator[nn.Parameter]:
        return iter(self.trained)

    def forward(self, *batch: Tensor) -> tuple[Tensor, ...]:
        return self.step(*batch)
