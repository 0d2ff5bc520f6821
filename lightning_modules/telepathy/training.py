"""Training of a bridge: what a fit does before its first step, in a step, and with the gradient.

Shapes: B batch, S source positions of the question, C source width, N answer tokens of the whole batch, V target
vocabulary.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Collection
from functools import cached_property, partial

import torch
from lightning import Trainer
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.errors import UserError
from lightning_modules.core.contracts import Workload, connected
from lightning_modules.core.graphs import obstacle, records
from lightning_modules.core.precision import check_precision
from lightning_modules.core.reporting import is_dry_run, log_losses
from lightning_modules.core.schedule import Schedule, with_schedule
from lightning_modules.core.token_weight import token_weight
from lightning_modules.telepathy.batch import TelepathyBatch, TrainingBatch
from lightning_modules.telepathy.bridges import Bridge
from lightning_modules.telepathy.evaluation import BridgeEvaluation
from lightning_modules.telepathy.flaws import Flaw
from lightning_modules.telepathy.normalizer import calibrate
from lightning_modules.telepathy.objectives import BridgeStep, Objective, ObjectiveName, lm, weighted
from lightning_modules.telepathy.ranks import all_rows, shard_over
from lightning_modules.telepathy.recording import RECORDED, LossesOf, RecordedLosses
from lightning_modules.telepathy.source import Source
from lightning_modules.telepathy.source_cache import fixed_questions
from lightning_modules.telepathy.text_prefix import TextPrefix, clip_apart
from lightning_modules.telepathy.workload import workload


class BridgeTraining(BridgeEvaluation, ABC):
    """A module that returns soft tokens, as far as its training goes. The subclass sets the attributes.

    Attributes:
        source: The frozen source.
        bridge: The bridge.
        normalizer: The normalisation of source states before the bridge.
        objectives: The objectives by name.
        heads: The trained heads of objectives that have one, by name.
        scale: The scale of soft tokens.
        flaws: The flaws of the notes to reproduce.
        optimizer: The optimizer, without its parameters.
        warmup_steps: Steps in which the learning rate rises.
        schedule: The learning rate after the warm-up.
        cache_source: Whether the source reads all questions once before a fit.
        cuda_graphs: Whether to record the training step on a GPU.
        shard_frozen: Whether a fit splits source and target over its processes.
    """

    source: Source
    bridge: Bridge
    normalizer: nn.Module
    objectives: dict[ObjectiveName, Objective]
    heads: nn.ModuleDict
    scale: float
    flaws: Collection[Flaw]
    optimizer: OptimizerCallable
    warmup_steps: int
    schedule: Schedule
    cache_source: bool
    cuda_graphs: bool
    text_prefix: TextPrefix | None
    shard_frozen: bool

    @abstractmethod
    def read(self, batch: TelepathyBatch) -> Tensor:
        """Return the source's states_BSC at the question."""

    def setup(self, stage: str) -> None:
        """Check the precision; before a fit, free the source or split the frozen models where that is asked for."""
        check_precision(self.trainer, double=False)
        if stage == "fit" and self.cache_source:
            questions = fixed_questions(connected(self.trainer).datamodule)
            if not is_dry_run(self.trainer):
                self.source.move_to_files(questions, self.trainer)
        if stage == "fit" and self.shard_frozen:
            shard_over(self.trainer, self.source.model, self.target.model)

    def on_fit_start(self) -> None:
        """Check the target and the number of steps, and measure the normalizer's statistics.

        Raises:
            UserError: The target does not answer soft tokens, codes that come late have no end of the training to
                wait for, or the data gives no held-out questions.
        """
        self.target.check(trains=True)
        if self.bottleneck.is_late and self.trainer.estimated_stepping_batches == math.inf:
            raise UserError(
                "trainer.max_steps must be set: model.bottleneck vq makes codes in the last fifth of the steps"
            )
        calibrate(self, self.normalizer, self.read)
        self._step: LossesOf = self.losses
        if records(self, self.cuda_graphs, self.why_not_recorded):
            self._step = RecordedLosses(self, self.losses, self.source.positions, self.target.positions)

    def on_fit_end(self) -> None:
        """Free a recorded step."""
        self._step = self.losses

    def why_not_recorded(self, trainer: Trainer) -> str | None:
        """Return why the steps of a fit cannot be CUDA graphs, or None."""
        others = [str(name) for name in self.objectives if name not in RECORDED]
        if others:
            return f"model.objectives has {', '.join(others)}"
        if self.bottleneck.size or self.text_prefix is not None or self.cache_source:
            return "it cannot be combined with model.bottleneck, model.text_prefix or model.cache_source"
        if self.bridge.soft_tokens is None or self.bridge.samples:
            return "the bridge draws noise, or its number of soft tokens depends on the question"
        if getattr(connected(trainer).datamodule, "max_tokens", None):
            return "data.max_tokens makes batches of many sizes"
        if self.source.model.reads_padding:
            return "the source reads padding"
        return obstacle(trainer)

    def training_step(self, batch: TrainingBatch, batch_idx: int) -> Tensor:
        """Log each weighted objective and return their sum, with the loss of the text prefix if there is one."""
        self.bottleneck.progress = self.global_step / self.trainer.estimated_stepping_batches
        loss, losses = self._step(batch)
        logged, total = losses | {"loss": loss}, loss
        if self.text_prefix is not None:
            prefixed = batch["prefixed"]
            logits_NV = self.target.logits(prefixed, self.text_prefix.vectors(len(batch["source"])))
            logged["text_prefix"] = token_weight(self, len(logits_NV)) * lm(logits_NV, prefixed.labels_N)
            total = total + logged["text_prefix"]
        log_losses(self, logged)
        return total

    def losses(self, batch: TrainingBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the sum of the weighted objectives, and each by name."""
        encoding, gather, weight = self.encode(batch), partial(all_rows, self), partial(token_weight, self)
        logits_NV = self.target.logits(batch["soft"], encoding.soft_BKD)
        parts = self.target, self.bridge, self.bottleneck
        step = BridgeStep(batch, *parts, encoding, logits_NV, self.scale, gather, self.heads, self.flaws)
        losses = weighted(self.objectives, step, weight)
        return torch.stack(list(losses.values())).sum(), losses

    def workload(self, batch: TrainingBatch) -> Workload:
        """Return samples, target positions and flops of a training step."""
        return workload(batch, self._sizes)

    @cached_property
    def _sizes(self) -> list[int]:
        return [sum(p.numel() for p in part.parameters()) for part in (self.source, self.target, self.bridge)]

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradient of the bridge, and apart from it that of the text prefix, which must not change it."""
        clip_apart(self, self.text_prefix, optimizer, gradient_clip_val, gradient_clip_algorithm)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """Return the optimizer and its schedule."""
        return with_schedule(self, self.optimizer, self.warmup_steps, self.schedule)
