"""The separability line: what a shared residual stream carries, and how it answers to interventions.

Shapes: S members, B batch, T positions, V vocabulary, D width.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lightning import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from datamodules.batch import IGNORE
from datamodules.errors import UserError
from lightning_modules.core.contracts import Workload
from lightning_modules.core.decoder import Decoder
from lightning_modules.core.ensemble import call_members, observe, stack_members
from lightning_modules.core.predictions import show_attention, write_predictions
from lightning_modules.core.reporting import count_samples
from lightning_modules.core.schedule import with_schedule
from lightning_modules.core.sites import match_modules
from lightning_modules.separability.anchor import Orthogonality, load_network, write_members
from lightning_modules.separability.measures import Separation, member_losses, position_overlap


class Separability(LightningModule):
    """A decoder-only transformer trained to say what comes next, and measured at its last residual stream.

    Batches have `tokens` and `labels`: at each position what comes after it, -100 where nothing is asked. Measures are
    those of `Separation`, under `validation/` and `test/`. With `ensemble: S`, S seeds train as one program, each with
    the initial weights, the order of data and the clipping that a run of its own would have.

    Args:
        vocab_size: Tokens of the data.
        seq_len: Longest sequence of the data.
        width: Width of the residual stream.
        depth: Blocks.
        heads: Heads of each block, a divisor of the width.
        mlp_width: Hidden units of each MLP, four times the width if left out.
        norm: `layer` for LayerNorm before each part and at the end; `none` for no norm at all.
        optimizer: The optimizer, without its parameters.
        schedule: The learning rate after warm-up: a cosine to zero at `trainer.max_steps`, or constant.
        warmup_steps: Steps in which the learning rate rises.
        ensemble: Seeds trained at once; member s has the initial weights of an ordinary run with seed + s.
        seed: Of the initial weights; the run's own if left out.
        start: A checkpoint of this line to begin from, instead of random weights.
        orthogonality: An anchor model whose residual stream is to be avoided.
        loss_precision: Precision of the cross-entropy; below about 1e-7 fp32 rounds it to zero.
        compile: Compile the training step; left off, with a warning, where a callback such as a clamp acts in it.
        save_members: Write each member's weights after fit, as checkpoints of ordinary models, to `members/`.

    Raises:
        UserError: A number that does not fit; at `setup`, a checkpoint or data that does not.
    """

    def __init__(
        self,
        vocab_size: int,
        seq_len: int,
        width: int = 128,
        depth: int = 1,
        heads: int = 4,
        mlp_width: int | None = None,
        norm: Literal["layer", "none"] = "layer",
        optimizer: OptimizerCallable = torch.optim.AdamW,
        schedule: Literal["cosine", "constant"] = "cosine",
        warmup_steps: int = 100,
        ensemble: int = 1,
        seed: int | None = None,
        start: str | None = None,
        orthogonality: Orthogonality | None = None,
        loss_precision: Literal["fp32", "fp64"] = "fp32",
        compile: bool = False,
        save_members: bool = False,
    ):
        super().__init__()
        sizes = {"vocab_size": vocab_size, "seq_len": seq_len, "width": width, "depth": depth, "heads": heads}
        for name, size in {**sizes, "ensemble": ensemble, "mlp_width": 1 if mlp_width is None else mlp_width}.items():
            if size < 1:
                raise UserError(f"model.{name} must be at least 1, not {size}")
        if width % heads:
            raise UserError(f"model.heads must divide model.width: {heads} does not divide {width}")
        self.vocab_size, self.seq_len, self.width, self.ensemble = vocab_size, seq_len, width, ensemble
        self.optimizer, self.schedule, self.warmup_steps = optimizer, schedule, warmup_steps
        self.start, self.orthogonality, self._double = start, orthogonality, loss_precision == "fp64"
        self.compile_step, self.save_members = compile, save_members
        self.first_seed = torch.initial_seed() if seed is None else seed
        seeds = [self.first_seed + member for member in range(ensemble)]
        self.network = stack_members(lambda: Decoder(**sizes, mlp_width=mlp_width, norm=norm), seeds)
        self.separation = Separation(ensemble, vocab_size, width)
        self.members: dict[str, Tensor] = {}
        self.intervals: dict[str, tuple[float, float]] = {}
        self.counts: dict[str, int] = {}
        self._last_step: tuple[Tensor, Tensor] | None = None
        self._losses = self.losses  # compiled at the start of fit, if asked for

    def setup(self, stage: str) -> None:
        """Check precision and the data's sizes, and load the weights of `start` and of the anchor."""
        if (precision := self.trainer.precision) in ("bf16-true", "16-true"):
            raise UserError(f"trainer.precision: {precision} rounds small updates away, use bf16-mixed or 32-true")
        data = self.trainer.datamodule
        for name in ("vocab_size", "seq_len"):
            needed, given = getattr(data, name, 0), getattr(self, name)
            if needed > given:
                raise UserError(f"model.{name} is {given} and the data needs {needed}: set --model.{name} {needed}")
        if self.start and not self.trainer.ckpt_path:  # whose weights are taken otherwise
            self.network.load_state_dict(load_network(self.start, self.network, self.ensemble, "model.start"))
        self.start = None  # a test after training keeps what was learnt
        if self.orthogonality:
            self.orthogonality.load(self.network, self.ensemble)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits_BTV; of an ensemble logits_SBTV, for tokens_SBT or, the same for all members, tokens_BT."""
        return self.call(tokens)[0] if self.ensemble > 1 else self.network(tokens)

    def call(self, tokens: Tensor, labels: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits and the last residual stream, (logits_SBTV, x_SBTD), also of an ordinary model, where S is 1."""
        if self.ensemble > 1:
            return call_members(self.network, self.ensemble, tokens, labels, with_residual=True)
        logits_BTV, x_BTD = self.network(tokens, with_residual=True)
        return logits_BTV[None], x_BTD[None]

    def activations(self, tokens: Tensor, sites: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits_SBTV, and the outputs of the modules that match, by name, each with a first axis of S."""
        seen: dict[str, Tensor] = {}

        def look(name: str) -> Any:
            def note(x: Tensor) -> None:
                seen[name] = x if self.ensemble > 1 else x[None]

            return lambda module, args, output: observe(output, note)

        handles = [module.register_forward_hook(look(name)) for name, module in match_modules(self, sites).items()]
        try:
            return self.call(tokens)[0], seen
        finally:
            for handle in handles:
                handle.remove()

    def on_fit_start(self) -> None:
        """Compile the step, unless a callback's hooks act in it, which a compiled step would leave out."""
        hooked = [name for name, module in self.network.named_modules() if module._forward_hooks]
        if self.compile_step and hooked:
            rank_zero_warn(f"model.compile is ignored: a callback has a hook on {hooked[0]}")
        elif self.compile_step:
            self._losses = torch.compile(self.losses)
            if self.orthogonality:
                self.orthogonality.train_residual = torch.compile(self.orthogonality.residual)

    def losses(self, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Each member's cross-entropy, with logits and last residual stream: (loss_S, logits_SBTV, x_SBTD)."""
        logits_SBTV, x_SBTD = self.call(tokens, labels)
        return member_losses(logits_SBTV, labels, self._double), logits_SBTV, x_SBTD

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        """The sum of the members' losses, so that each has the gradient that it would have alone."""
        self._last_step = None  # frees logits before there are new ones
        loss_S, logits_SBTV, x_SBTD = self._losses(batch["tokens"], batch["labels"])
        self.members["train/loss"] = loss_S.detach()
        self.log("train/loss", loss_S.detach().mean(), batch_size=1, prog_bar=True)
        if self.orthogonality:
            penalty_S = self.orthogonality.penalty(x_SBTD, batch["tokens"], batch["labels"])
            self.log("train/orthogonality", penalty_S.detach().mean(), batch_size=1)
            loss_S = loss_S + self.orthogonality.weight * penalty_S
        self._last_step = logits_SBTV.detach(), batch["labels"]
        return loss_S.sum()

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip each member's gradient by its own norm."""
        if self.ensemble == 1 or not gradient_clip_val or gradient_clip_algorithm == "value":
            return self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        gradients = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        squares_S = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0)
        factor_S = (gradient_clip_val / (squares_S.sqrt() + 1e-6)).clamp(max=1)  # as torch's clip_grad_norm_
        for gradient in gradients:
            gradient.mul_(factor_S.view(-1, *[1] * (gradient.dim() - 1)))

    def on_validation_epoch_start(self) -> None:
        """The share of right answers in the last training step, which costs no pass of its own; of all ranks."""
        if self._last_step is not None:
            logits_SBTV, labels = self._last_step
            labelled, hit = labels != IGNORE, logits_SBTV.argmax(3) == labels
            counts_2S = torch.stack([(hit & labelled).flatten(1).sum(1), labelled.expand(hit.shape).flatten(1).sum(1)])
            hits_S, asked_S = self.trainer.strategy.reduce(counts_2S, reduce_op="sum")
            self.log_members({"train/accuracy": hits_S / asked_S})
            self.members["train/loss"] = self.trainer.strategy.reduce(self.members["train/loss"], reduce_op="mean")

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure."""
        labels = batch["labels"]
        logits_SBTV, x_SBTD = self.call(batch["tokens"], labels)
        cosine_SBT = None
        if self.orthogonality:
            cosine_SBT = self.orthogonality.cosine(x_SBTD, self.orthogonality.residual(batch["tokens"]))
        unembed_SVD = self.network.unembed.weight.view(self.ensemble, self.vocab_size, self.width)
        self.separation.update(logits_SBTV, x_SBTD, labels, unembed_SVD, cosine_SBT)

    def test_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        """Measure, and keep an input to draw."""
        self.validation_step(batch, batch_idx)
        self._shown = batch["tokens"][:1]

    def on_validation_epoch_end(self) -> None:
        """Log the measures."""
        self._log_separation("validation")

    def on_test_epoch_end(self) -> None:
        """Log the measures, the task's bounds and how far positions overlap; draw where an input is looked at."""
        show_attention(self, self._shown)  # not in a step, where a clamp has the labels of a whole batch
        self._log_separation("test")
        position_STD = self.network.position_embedding.weight.view(self.ensemble, -1, self.width)
        self.log_members({"test/position_overlap": position_overlap(position_STD)} | self._bounds())

    def _bounds(self) -> dict[str, Tensor]:
        """What the task lets accuracy be, told beside it: a blind guess's, and the best that is possible, if known."""
        told = {f"test/{name}": getattr(self.trainer.datamodule, name, None) for name in ("chance", "ceiling")}
        return {name: torch.full([self.ensemble], x, device=self.device) for name, x in told.items() if x is not None}

    def _log_separation(self, stage: str) -> None:
        measured, count = self.separation.compute()
        self.log_members({f"{stage}/{name}": values_S for name, values_S in measured.items()})
        count_samples(self, f"{stage}/accuracy", measured["accuracy"], int(count))
        self.separation.reset()

    def log_members(self, values: dict[str, Tensor]) -> None:
        """Log means over members, the same on every rank, and keep every member's."""
        for name, values_S in values.items():
            self.log(name, values_S.float().mean(), prog_bar=name == "validation/accuracy", sync_dist=True)
            self.members[name] = values_S.detach().float().cpu()

    def predict_step(self, batch: dict[str, Tensor], batch_idx: int) -> dict[str, Tensor]:
        """Write logits, losses and attention for the inputs, into `predictions/` of the run's folder."""
        return write_predictions(self, batch, batch_idx)

    def workload(self, batch: dict[str, Tensor]) -> Workload:
        """Sequences, tokens and flops of a training step, over all members: 6 a parameter (embeddings left out)."""
        members = 1 if batch["tokens"].dim() == 3 else self.ensemble
        rows, tokens = members * batch["tokens"][..., 0].numel(), members * batch["tokens"].numel()
        weights = sum(value.numel() for name, value in self.network.named_parameters() if "embedding" not in name)
        return Workload(rows, tokens, 6 * tokens * weights // self.ensemble)

    def configure_optimizers(self) -> dict[str, Any]:
        """Make the optimizer and its schedule."""
        return with_schedule(self, self.optimizer, self.warmup_steps, self.schedule)

    def on_fit_end(self) -> None:
        """Write the members' checkpoints, if asked for."""
        if self.save_members and not self.trainer.fast_dev_run:
            write_members(self)
