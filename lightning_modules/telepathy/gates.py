"""Gates: cheap checks of models, prompt and data, which a run passes before it is worth hours of a GPU.

Shapes: B batch, S source positions, C source width, K vectors, D target width, N answer tokens of the whole batch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Protocol

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.cli import OptimizerCallable
from numpy.typing import NDArray
from torch import Tensor, nn

from datamodules.problems import Problem
from lightning_modules.core.contracts import Figure, Gate
from lightning_modules.core.held_out import held_out_batches
from lightning_modules.core.samples import gather_objects
from lightning_modules.core.schedule import warmup
from lightning_modules.pretrained.generation import Answer
from lightning_modules.pretrained.prompts import pad
from lightning_modules.telepathy.averages import row_mean
from lightning_modules.telepathy.batch import EvaluationBatch, TrainingBatch
from lightning_modules.telepathy.encoding import Encoding
from lightning_modules.telepathy.objectives import Objective, ObjectiveName, lm
from lightning_modules.telepathy.target import Target

BY_HEART = 16  # problems per rank that a bridge and soft prompts have to fit
CE_GAP = 0.02  # nats per token by which question embeddings may differ from the text, which is rounding
ACCURACY_GAP = 0.02  # the same for the proportion of right answers: a rounded logit may change a token
BRIDGE_LOSS = 0.1  # nats per token of problems that a bridge knows by heart
PROMPT_LOSS = 0.05  # nats per token with soft prompts that were optimised for each problem
PROMPT_RATE = 0.05  # learning rate of soft prompts, in units of the embeddings' scale
LOOK = 5  # steps between two looks at the loss

TEXT = "the target hardly solves these problems even as text: choose another target, prompt or data.answer_format"
EMBEDDINGS = "vectors in the place of the question do not arrive as its text does: the target or prompt cannot be used"
OVERFIT = "the bridge cannot learn a few problems by heart: raise its size or learning rate, or read another layer"
SOFT_PROMPT = "no vectors make the target give these answers: it cannot be steered from this place in the prompt"


Rows = tuple[Any, Tensor | None, Tensor | None]  # rows, vectors_BKD, mask_BK
Vectors = Callable[[], tuple[Tensor, Tensor | float]]  # soft_BKD, and what is to be lowered beside the cross-entropy


class Gated(Protocol):
    """A module with a bridge, as far as gates need it."""

    target: Target
    optimizer: OptimizerCallable
    warmup_steps: int
    objectives: dict[ObjectiveName, Objective]

    @property
    def trainer(self) -> Trainer:
        """The trainer."""
        ...

    @property
    def answer_limit(self) -> int:
        """Length limit of generated answers, in tokens."""
        ...

    def read(self, batch: Any) -> Tensor:
        """Return states_BSC at the questions."""
        ...

    def encode(self, batch: Any) -> Encoding:
        """Return soft_BKD with its codes."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Set the mode of training."""
        ...

    def eval(self) -> Any:
        """Set the mode of evaluation."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state without that of the frozen models."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Restore a state."""
        ...

    def collate(self, problems: Sequence[Problem], training: bool) -> Any:
        """Return a batch of problems."""
        ...


@dataclass
class _Read:
    """What the target made of a set of questions on all ranks: right answers, and the loss of reference answers."""

    right_B: NDArray[np.bool_]
    losses_N: NDArray[np.floating]

    @property
    def accuracy(self) -> float:
        return float(self.right_B.mean())

    @property
    def loss(self) -> float:
        return float(self.losses_N.mean())


def gates(module: Gated, count: int, least_accuracy: float, steps: int) -> Iterator[Gate]:
    """Run the gates of a module one after the other. Every rank must call it.

    The weights of the module are the same afterwards.

    Args:
        module: The module, connected to a trainer.
        count: Held-out problems of all ranks that the target answers.
        least_accuracy: Proportion of them that the target has to answer right as text.
        steps: Most steps of training in a gate.

    Raises:
        UserError: The data gives no held-out problems, or the target does not answer soft tokens.
    """
    held_out = held_out_batches(module.trainer, count, "Gates", "problems")
    to_device = module.trainer.strategy.batch_to_device
    module.target.check(trains=True)
    with torch.no_grad(), module.trainer.precision_plugin.val_step_context():
        batches: list[EvaluationBatch] = [to_device(batch) for batch in held_out]
        text = _read(module, batches, lambda batch: (batch["text_rows"], None, None))
        yield Gate("text", [Figure("accuracy", text.accuracy, least_accuracy, hits=text.right_B.tolist())], TEXT)
        embedded = _read(module, batches, lambda batch: (batch["soft_rows"], *question_embeddings(module, batch)))
    gap = abs(embedded.loss - text.loss)
    least = text.accuracy - ACCURACY_GAP
    accuracy = Figure("accuracy", embedded.accuracy, least, hits=embedded.right_B.tolist())
    yield Gate("embeddings", [accuracy, Figure("ce_gap", gap, CE_GAP, at_most=True)], EMBEDDINGS)

    drawn = held_out_batches(module.trainer, BY_HEART * module.trainer.world_size, "Gates", "problems")
    problems = list(chain.from_iterable(batch["problems"] for batch in drawn))
    batch: TrainingBatch = to_device(module.collate(problems, training=True))
    loss = overfitted(module, batch, steps)
    yield Gate("overfit", [Figure("loss", loss, BRIDGE_LOSS, at_most=True)], OVERFIT)
    loss = prompted(module, batch, steps)
    yield Gate("soft_prompt", [Figure("loss", loss, PROMPT_LOSS, at_most=True)], SOFT_PROMPT)


def question_embeddings(module: Gated, batch: EvaluationBatch) -> tuple[Tensor, Tensor]:
    """Return vectors_BKD that the target makes of the questions, and mask_BK, in the form of soft tokens."""
    questions = [problem.question for problem in batch["problems"]]
    tokens_BK, mask_BK = pad(module.target.question_tokens(questions), 0)
    return module.target.vectors(tokens_BK.to(module.target.model.device)), mask_BK


def overfitted(module: Gated, batch: TrainingBatch, steps: int) -> float:
    """Train bridge and bottleneck on one batch with the module's optimizer; return the cross-entropy at the end.

    A codebook gets its gradient from the objective `commitment`, with its weight. The batch is that of this rank, and
    the cross-entropy the largest one of all ranks. The weights are put back.
    """
    with torch.no_grad(), module.trainer.precision_plugin.val_step_context():
        batch = TrainingBatch(**{**batch, "states": module.read(batch)})  # read once
    kept = {name: value.clone() for name, value in module.state_dict().items()}
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer = module.optimizer(parameters)
    rises = min(module.warmup_steps, steps // 4)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: warmup(step + 1, rises))

    def step() -> None:
        clip = module.trainer.gradient_clip_val
        if clip:
            nn.utils.clip_grad_norm_(parameters, float(clip))
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    commitment = module.objectives.get("commitment")

    def encoded() -> tuple[Tensor, Tensor | float]:
        encoding = module.encode(batch)
        if encoding.codes is None or commitment is None:
            return encoding.soft_BKD, 0.0
        return encoding.soft_BKD, commitment.weight * row_mean(encoding.codes.commitment_BK, batch["soft_mask"])

    module.train()
    try:
        return _descend(module, batch, encoded, step, steps, BRIDGE_LOSS)
    finally:
        optimizer.zero_grad()
        module.load_state_dict(kept)
        module.eval()


def prompted(module: Gated, batch: TrainingBatch, steps: int) -> float:
    """Optimise vectors for each problem of a batch; return the cross-entropy at the end, see `overfitted`."""
    scale, mask_BK = module.target.scale(), batch["soft_mask"]
    generator = torch.Generator().manual_seed(0)
    start_BKD = torch.randn(*mask_BK.shape, module.target.width, generator=generator)
    unit_BKD = nn.Parameter(start_BKD.to(mask_BK.device))  # of size 1, to which rates of learning are fitted
    optimizer = torch.optim.Adam([unit_BKD], lr=PROMPT_RATE)

    def step() -> None:
        optimizer.step()
        optimizer.zero_grad()

    return _descend(module, batch, lambda: (scale * unit_BKD, 0.0), step, steps, PROMPT_LOSS)


def _descend(
    module: Gated, batch: TrainingBatch, vectors: Vectors, step: Callable[[], None], steps: int, low: float
) -> float:
    """Lower the cross-entropy of the answers until it is below `low` on every rank, or for `steps` steps."""
    plugin, packing, loss = module.trainer.precision_plugin, batch["soft"], float("nan")
    for number in range(steps + 1):
        context: AbstractContextManager[Any] = plugin.train_step_context()
        with torch.enable_grad():
            with context:
                soft_BKD, beside = vectors()
                loss_now = lm(module.target.logits(packing, soft_BKD), packing.labels_N)
            if number % LOOK == 0 or number == steps:
                # Ranks decide together, since a sharded target needs all of them in every step
                loss = float(module.trainer.strategy.reduce(loss_now.detach().clone(), reduce_op="max"))
                if not low < loss < float("inf"):
                    break
            (loss_now + beside).backward()  # type: ignore[no-untyped-call]  # torch has no types here
        step()
    return loss


def _read(module: Gated, batches: Sequence[EvaluationBatch], rows_of: Callable[[EvaluationBatch], Rows]) -> _Read:
    right: list[bool] = []
    losses: list[NDArray[np.floating]] = []
    for batch in batches:
        rows, vectors_BKD, mask_BK = rows_of(batch)
        losses += module.target.losses(rows, vectors_BKD, mask_BK)
        answers: list[Answer] = module.target.answers(rows, module.answer_limit, vectors_BKD, mask_BK)
        right += [problem.is_correct(a.text) for problem, a in zip(batch["problems"], answers, strict=True)]
    parts = gather_objects((right, losses))
    every = [loss_N for _, of_rank in parts for loss_N in of_rank]
    return _Read(np.array([hit for hits, _ in parts for hit in hits]), np.concatenate(every))
