"""Gates: cheap checks of models, prompt and data, which a run passes before it is worth hours of a GPU.

Shapes: B batch, K vectors, D target width, N answer tokens of the whole batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_modules.core.contracts import Figure, Gate
from lightning_modules.core.held_out import held_out_batches
from lightning_modules.core.samples import gather_objects
from lightning_modules.pretrained.answers import Answer
from lightning_modules.pretrained.prompts import pad
from lightning_modules.telepathy.batch import EvaluationBatch, TrainingBatch
from lightning_modules.telepathy.by_heart import overfitted, prompted
from lightning_modules.telepathy.contracts import Gated

BY_HEART = 16  # problems per rank that a bridge and soft prompts have to fit
CE_GAP = 0.02  # nats per token by which question embeddings may differ from the text, which is rounding
ACCURACY_GAP = 0.02  # the same for the proportion of right answers: a rounded logit may change a token
BRIDGE_LOSS = 0.1  # nats per token of problems that a bridge knows by heart
PROMPT_LOSS = 0.05  # nats per token with soft prompts that were optimised for each problem

TEXT = "the target hardly solves these problems even as text: choose another target, prompt or data.answer_format"
EMBEDDINGS = "vectors in the place of the question do not arrive as its text does: the target or prompt cannot be used"
OVERFIT = "the bridge cannot learn a few problems by heart: raise its size or learning rate, or read another layer"
SOFT_PROMPT = "no vectors make the target give these answers: it cannot be steered from this place in the prompt"

Rows = tuple[Any, Tensor | None, Tensor | None]  # rows, vectors_BKD, mask_BK


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
    loss = overfitted(module, batch, steps, BRIDGE_LOSS)
    yield Gate("overfit", [Figure("loss", loss, BRIDGE_LOSS, at_most=True)], OVERFIT)
    loss = prompted(module, batch, steps, PROMPT_LOSS)
    yield Gate("soft_prompt", [Figure("loss", loss, PROMPT_LOSS, at_most=True)], SOFT_PROMPT)


def question_embeddings(module: Gated, batch: EvaluationBatch) -> tuple[Tensor, Tensor]:
    """Return vectors_BKD that the target makes of the questions, and mask_BK, in the form of soft tokens."""
    questions = [problem.question for problem in batch["problems"]]
    tokens_BK, mask_BK = pad(module.target.rows.question_tokens(questions), 0)
    return module.target.vectors(tokens_BK.to(module.target.model.device)), mask_BK


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
