"""Telepathy: soft tokens from one frozen language model to another that shares no vocabulary with it.

Shapes: B batch, S source positions of the question, C source width, K soft tokens, D target width.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from datamodules.errors import SIZE, UserError, check_numbers
from datamodules.problems import Problem
from lightning_modules.core.contracts import Gate, OnNonfinite
from lightning_modules.core.schedule import Schedule
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.pretrained.loading_device import loading_to
from lightning_modules.telepathy.answer_limit import check_limit
from lightning_modules.telepathy.batch import EvaluationBatch, TelepathyBatch, TrainingBatch
from lightning_modules.telepathy.bottleneck import BottleneckName, make_bottleneck
from lightning_modules.telepathy.bridges import BridgeFactory
from lightning_modules.telepathy.collation import evaluation_batch, row_lengths, training_batch
from lightning_modules.telepathy.encoding import Encoding
from lightning_modules.telepathy.flaws import NOTES_SCALE, Flaw, chosen, make_output
from lightning_modules.telepathy.frozen import frozen_names
from lightning_modules.telepathy.gates import gates
from lightning_modules.telepathy.noise import row_seeds
from lightning_modules.telepathy.normalizer import NormalizerName, calibrate, make_normalizer
from lightning_modules.telepathy.objectives import ObjectiveName, Setting, Sizes, make_objectives
from lightning_modules.telepathy.objectives.parts import check_parts
from lightning_modules.telepathy.output_scale import OutputName
from lightning_modules.telepathy.source import Source
from lightning_modules.telepathy.target import Target
from lightning_modules.telepathy.text_prefix import TextPrefix
from lightning_modules.telepathy.training import BridgeTraining


class Telepathy(BridgeTraining):
    """A frozen source reads a question, a bridge turns its hidden states into soft tokens, a frozen target answers.

    The target's prompt is `before {question} after`, and it sees `<bos> before [soft tokens] after`: the soft tokens
    take the place of the question's text. Only the bridge and the output scale are trained and in checkpoints, and the
    text prefix if there is one.

    Args:
        source: The model that reads, a decoder or an encoder. Only its layers up to `source_layer` are loaded.
        target: The model that answers, any causal language model.
        bridge: The bridge; its widths come from the models. A `KVBridge` reads and writes keys and values.
        source_layer: The layer, counted from 1, whose output the bridge reads; the outputs of several are concatenated.
        normalizer: Normalisation of source states before the bridge: `none`, `layer_norm`, `statistical`, with the mean
            and deviation over 256 held-out questions when `fit` starts, or `learned_statistical`, trained from there.
        output: How soft tokens are brought to the scale of the target's embeddings (see `OutputScale`).
        bottleneck: Replace each soft token by a code: `vq`: one of 4096 learned vectors; `fsq`: five rounded numbers.
        objectives: Objective -> weight, or -> {weight, options}, see `lightning_modules.telepathy.objectives`.
        optimizer: The optimizer, without its parameters.
        warmup_steps: Steps in which the learning rate rises.
        schedule: The learning rate after the warm-up: a cosine or a line to zero at `trainer.max_steps`, or constant.
        prompt: The target's prompt around `{question}`, or `chat` for the chat template of its tokenizer.
        source_prompt: The source's prompt, of which it reads the part before the question; None for `prompt`. With
            `chat` a source without a chat template reads the question alone.
        text_prefix: Number of learned vectors with which the target reads the text of the question, as a baseline (see
            `TextPrefix`); 0 for none. They train beside the bridge and do not change its course. A step takes about
            twice as long with them.
        max_new_tokens: Length limit of generated answers, in tokens; None for the length of the longest answer of the
            data, or for 256 where the data gives bare results.
        cache_source: Let the source read all questions once before a fit, keep its states in files, and free it.
        cuda_graphs: Record the training step on a GPU as CUDA graphs, for small models, whose steps are mostly
            launches. Ignored on a CPU, and with a warning where it is not possible.
        shard_frozen: Split source and target over the processes of a fit.
        reproduce_flaws: Flaws of the notes to reproduce, see `lightning_modules.telepathy.flaws`; `true` for those of
            their last version, `[key_scale, bos_behind]`.
        on_nonfinite: Whether a run ends when the loss or a weight is not finite.

    Raises:
        UserError: `source_layer` or `objectives` names something that does not exist, no objective has a
            weight, or a number is out of range.
    """

    def __init__(
        self,
        source: Pretrained,
        target: Pretrained,
        bridge: BridgeFactory,
        source_layer: int | list[int],
        normalizer: NormalizerName = "none",
        output: OutputName = "rms",
        bottleneck: BottleneckName = "none",
        objectives: dict[ObjectiveName, Setting] | None = None,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        warmup_steps: int = 50,
        schedule: Schedule = "cosine",
        prompt: str = "Question: {question}\nAnswer:",
        source_prompt: str | None = None,
        text_prefix: int = 0,
        max_new_tokens: int | None = None,
        cache_source: bool = False,
        cuda_graphs: bool = False,
        shard_frozen: bool = False,
        reproduce_flaws: bool | list[Flaw] = False,
        on_nonfinite: OnNonfinite = "stop",
    ):
        super().__init__(max_new_tokens)
        self.layers = [source_layer] if isinstance(source_layer, int) else source_layer
        self.objectives = make_objectives({"lm": 1.0} if objectives is None else objectives)
        self.flaws = chosen(reproduce_flaws)
        if not self.layers or min(self.layers) < 1:
            raise UserError(f"model.source_layer {source_layer} names no layer: they count from 1")
        check_numbers("model", 0, warmup_steps=warmup_steps)
        check_numbers("model", 0, SIZE, text_prefix=text_prefix)
        self.optimizer, self.schedule, self.warmup_steps = optimizer, schedule, warmup_steps
        self.on_nonfinite, self.cuda_graphs = on_nonfinite, cuda_graphs
        self.cache_source, self.shard_frozen = cache_source, shard_frozen
        notes_scale = "key_scale" in self.flaws
        with loading_to(torch.device("cpu")) if shard_frozen else nullcontext():
            self.source = Source(source, self.layers, prompt if source_prompt is None else source_prompt)
            self.target = Target(target, prompt, self.flaws)
        check_limit(self.target, max_new_tokens)
        self.bridge = bridge(self.source, self.target, not notes_scale)
        self.scale, width = self.target.scale(), self.target.width
        self.normalizer = make_normalizer(normalizer, self.source.width, NOTES_SCALE if notes_scale else None)
        self.bottleneck = make_bottleneck(bottleneck, width, self.flaws)
        self.soft_tokens = make_output(output, self.scale, self.flaws)
        self.text_prefix = TextPrefix(text_prefix, width, self.scale) if text_prefix else None
        check_parts(self.objectives, self.bridge, self.bottleneck, self.flaws)
        sizes = Sizes(self.source.width, width, len(self.target.embedding.weight), self.flaws)
        heads = {str(name): objective.head(sizes) for name, objective in self.objectives.items() if objective.head}
        self.heads = nn.ModuleDict(heads)
        self.strict_loading = False  # the frozen models are not in checkpoints
        # Each rank loads them by itself: DDP neither sends them from rank 0 nor keeps what is freed
        self._ddp_params_and_buffers_to_ignore = frozen_names(self)

    def collate(self, problems: Sequence[Problem], training: bool) -> TrainingBatch | EvaluationBatch:
        """Make a batch of problems, for training with packed rows, for evaluation with the problems."""
        parts = problems, self.source, self.target, self.bridge
        if not training:
            return evaluation_batch(*parts)
        return training_batch(*parts, *self._for_training)

    def lengths(self, problems: Sequence[Problem]) -> list[int]:
        """Return the tokens of each problem's longest row in training, of the source or of the target."""
        return row_lengths(problems, self.source, self.target, self.bridge, *self._for_training)

    @property
    def _for_training(self) -> tuple[Collection[str], TextPrefix | None, bool]:
        needs = {part for objective in self.objectives.values() for part in objective.needs}
        return needs, self.text_prefix, "padding_labels" in self.flaws

    def read(self, batch: TelepathyBatch) -> Tensor:
        """Return the source's states_BSC at the question, without the prompt and the BOS, whose state is an outlier."""
        return self.source.read(batch)

    def states(self, batch: TelepathyBatch) -> Tensor:
        """Return the normalised states_BSC, which the bridge reads."""
        states_BSC: Tensor = self.normalizer(self.read(batch))
        return states_BSC

    def encode(self, batch: TelepathyBatch) -> Encoding:
        """Return the soft tokens of a batch, and what they came from."""
        read, seed_B = (self.states(batch), batch["source_mask"]), None
        if self.bridge.samples:
            seed_B = row_seeds(batch["source"].gather(1, batch["source_place"]), batch["source_mask"], self.training)
        bridged_BKD = self.bridge(*read) if seed_B is None else self.bridge(*read, seed_B)
        vectors_BKD, codes = self.bottleneck(bridged_BKD, batch["soft_mask"])
        return Encoding(read[0], bridged_BKD, codes, self.soft_tokens(vectors_BKD, batch["soft_mask"]), seed_B)

    def forward(self, batch: TelepathyBatch) -> Tensor:
        """Return the soft tokens soft_BKD, zero after the last one of a row."""
        return self.encode(batch).soft_BKD

    def gates(self, count: int, least_accuracy: float, steps: int) -> Iterator[Gate]:
        """Run the gates, see `lightning_modules.telepathy.gates`."""
        calibrate(self, self.normalizer, self.read)
        return gates(self, count, least_accuracy, steps)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another kind of bridge, which a load that is not strict would accept.

        Raises:
            UserError: The checkpoint lacks a parameter of this module or has another one.
        """
        saved, expected = checkpoint["state_dict"].keys(), self.state_dict().keys()
        for name in sorted(saved ^ expected):
            verb = "does not have" if name in expected else "has"
            raise UserError(f"the checkpoint {verb} '{name}': it holds another kind of bridge, use its run's config")
