"""The LightningModule of every autoregressive line of research.

Shapes: S ensemble members, B batch, T positions, V vocabulary.
"""

from abc import ABC, abstractmethod
from collections.abc import Hashable
from typing import Literal

import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn

from datamodules.batch import TokenBatch
from datamodules.errors import SEEDS, UserError, check_numbers
from lightning_modules.core.attention import leave_out_cudnn_attention
from lightning_modules.core.checkpoints import load_network, write_members
from lightning_modules.core.contracts import HasVocabulary, OnNonfinite, Workload
from lightning_modules.core.decoder import count_weights
from lightning_modules.core.ensemble import member_state
from lightning_modules.core.graphs import GraphedStep, Step, records
from lightning_modules.core.losses import member_losses
from lightning_modules.core.precision import check_precision
from lightning_modules.core.reporting import is_dry_run, log_losses, run_folder
from lightning_modules.core.schedule import Schedule, with_schedule
from lightning_modules.core.sequence_evaluation import SequenceEvaluation
from lightning_modules.core.sizes import check_sizes
from lightning_modules.core.token_weight import weigh_labels

MOST_MEMBERS = 4096  # of an ensemble
Penalties = dict[str, tuple[float | Tensor, Tensor]]  # name -> (weight or weight_S, value_S)


class SequenceModel(SequenceEvaluation, ABC):
    """A network that is trained to predict what comes next, alone or as an ensemble of S seeds in one program.

    Batches are `TokenBatch`: `labels` are aligned with the logits, and `IGNORE` where there is no target. The network
    maps tokens_BT to logits_BTV, or to a tuple that begins with logits_BTV. Nothing is assumed about its parts.

    A line of research writes `make_network`, and may write `make_measures` and `update_measures` (measures of the
    line), `penalties` (terms added to the loss) and `test_measures` (measures of the parameters). It stores the options
    that `make_network` reads before it calls `super().__init__`.

    With `ensemble: S` each member has the initial weights, the order of data and the gradient clipping of an ordinary
    run with seed + s. Every parameter then has a first axis of S.

    Args:
        vocab_size: Tokens of the data.
        seq_len: Longest sequence of the data.
        optimizer: The optimizer, without its parameters.
        schedule: The learning rate after the warm-up: a cosine or a line to zero at `trainer.max_steps`, or constant.
        warmup_steps: Steps of the linear warm-up.
        ensemble: S, the number of seeds trained at once.
        seed: Seed of the initial weights; the run's seed if None.
        start: Checkpoint of the same line to start from, instead of random weights.
        loss_precision: Precision of the cross-entropy; fp32 rounds losses below about 1e-7 to zero.
        compile: Compile the training step. Ignored, with a warning, if a callback has a hook on the network.
        cuda_graphs: Record the training step on a GPU as CUDA graphs, for small networks, whose steps are mostly
            launches; see `GraphedStep`. Ignored on a CPU, and with a warning where it is not possible.
        save_members: Write the weights of each member after fit to `members/`, as checkpoints of ordinary models.
        on_nonfinite: Whether a run ends when the loss or a weight is not finite, in all members of an ensemble.

    Raises:
        UserError: A size is below 1; at `setup`, the precision is unsuitable, or a checkpoint or the data does not fit.
    """

    def __init__(
        self,
        vocab_size: int,
        seq_len: int,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Schedule = "cosine",
        warmup_steps: int = 100,
        ensemble: int = 1,
        seed: int | None = None,
        start: str | None = None,
        loss_precision: Literal["fp32", "fp64"] = "fp32",
        compile: bool = False,
        cuda_graphs: bool = False,
        save_members: bool = False,
        on_nonfinite: OnNonfinite = "stop",
    ):
        check_sizes(vocab_size=vocab_size, seq_len=seq_len)
        check_numbers("model", 1, MOST_MEMBERS, ensemble=ensemble)
        check_numbers("model", 0, SEEDS - ensemble, seed=seed)
        check_numbers("model", 0, warmup_steps=warmup_steps)
        leave_out_cudnn_attention()
        self.vocab_size, self.seq_len = vocab_size, seq_len
        first = torch.initial_seed() if seed is None else seed
        super().__init__(self.make_network, [first + member for member in range(ensemble)])
        self.optimizer, self.schedule, self.warmup_steps = optimizer, schedule, warmup_steps
        self.start, self.double_loss = start, loss_precision == "fp64"
        self.compile_step, self.cuda_graphs = compile, cuda_graphs
        self.save_members, self.on_nonfinite = save_members, on_nonfinite
        self._step_losses = self.losses
        self._step: Step = self._losses_and_outputs

    # What a line writes

    @abstractmethod
    def make_network(self) -> nn.Module:
        """Return one network with random weights; called once per seed, with that seed set."""

    def member_network(self, member: int) -> nn.Module:
        """Return the network of one member with its weights, as an ordinary network."""
        if self.ensemble == 1:
            return self.network
        network = self.make_network()
        network.load_state_dict(member_state(self.network.state_dict(), member))
        return network.train(self.training)

    def penalties(self, outputs: tuple[Tensor, ...], batch: TokenBatch) -> Penalties:
        """Return the terms that are added to the loss of each member, with their weights."""
        return {}

    # Training

    def setup(self, stage: str) -> None:
        """Check the precision and the sizes of the data, and load the weights of `start`."""
        check_precision(self.trainer)
        data = self._data
        if isinstance(data, HasVocabulary):
            needs = ("vocab_size", self.vocab_size, data.vocab_size), ("seq_len", self.seq_len, data.seq_len)
            for name, size, needed in needs:
                if needed > size:
                    raise UserError(f"model.{name} is {size} and the data needs {needed}: set --model.{name} {needed}")
        if self.start and not self.trainer.ckpt_path:  # a checkpoint of the run itself comes first
            self.network.load_state_dict(load_network(self.start, self.network, self.ensemble, "model.start"))
        self.start = None  # a test after training keeps the trained weights

    def on_fit_start(self) -> None:
        """Compile the step, unless a callback has a hook on the network, which a compiled step would leave out."""
        self._step = self._losses_and_outputs  # a fit that failed leaves its record
        hooked = [name for name, module in self.network.named_modules() if module._forward_hooks]
        if self.compile_step and hooked:
            rank_zero_warn(f"model.compile is ignored: a callback has a hook on {hooked[0]}")
        elif self.compile_step:
            self.compile_losses()
        if records(self, self.cuda_graphs):
            self._step = GraphedStep(self, self._losses_and_outputs, self.step_variant)

    def compile_losses(self) -> None:
        """Compile the forward and the loss of the training step."""
        self._step_losses = torch.compile(self.losses)

    def losses(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the cross-entropy of each member, loss_S, and the outputs of the network.

        A line that never makes all logits returns the tokens_SBT that it predicts in their place; see `LastStep`.
        """
        outputs = self.call(tokens, labels)
        return member_losses(outputs[0], labels, self.double_loss), outputs

    def step_variant(self) -> Hashable:
        """Return what `losses` depends on beside the tensors of a batch and the parameters."""
        return None

    def _losses_and_outputs(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
        loss_S, outputs = self._step_losses(tokens, labels)
        if type(self).penalties is SequenceModel.penalties:  # outputs are only read
            outputs = tuple(output.detach() for output in outputs)
        return loss_S, *outputs

    def training_step(self, batch: TokenBatch, batch_idx: int) -> Tensor:
        """Return the sum of the members' losses, so that each member has the gradient of a separate run."""
        self.last_step.outcome = None  # frees the logits before there are new ones
        loss_S, *outputs = self._step(batch["tokens"], batch["labels"])
        loss_S = weigh_labels(self, loss_S, batch["labels"])  # gradients are means over ranks
        self.members["train/loss"] = loss_S.detach()
        logged = {"loss": loss_S}
        for name, (weight, value_S) in self.penalties(tuple(outputs), batch).items():
            logged[name], loss_S = value_S, loss_S + weight * value_S
        log_losses(self, {name: value_S.mean() for name, value_S in logged.items()})
        self.last_step.outcome = outputs[0].detach(), batch["labels"], self.members["train/loss"]
        return loss_S.sum()

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer and its schedule."""
        return with_schedule(self, self.optimizer, self.warmup_steps, self.schedule)

    def on_fit_end(self) -> None:
        """Free a recorded step, and write the checkpoints of the members, if `save_members` is set."""
        self._step = self._losses_and_outputs
        if not self.save_members or is_dry_run(self.trainer):
            return
        folder = run_folder(self.trainer) / "members"
        if self.trainer.is_global_zero:
            state = data.state_dict() if isinstance(data := self._data, LightningDataModule) else {}
            named = {type(data).__qualname__: state} if state else {}  # as Lightning names it
            write_members(folder, self.network, self.seeds, self.current_epoch, self.global_step, named)

    def workload(self, batch: TokenBatch) -> Workload:
        """Return sequences, tokens and flops of a training step over all members: 6 flops per weight and token."""
        members = 1 if batch["tokens"].dim() == 3 else self.ensemble
        rows, tokens = members * batch["tokens"][..., 0].numel(), members * batch["tokens"].numel()
        return Workload(rows, tokens, 6 * tokens * count_weights(self.network) // self.ensemble)
