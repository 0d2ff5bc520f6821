"""Objectives on what the target predicts from the soft tokens.

Shapes: N answer tokens of the whole batch, V vocabulary.
"""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.errors import SIZE, check_numbers
from lightning_modules.telepathy.objectives.step import BridgeStep, Objective, RowsOf


def lm(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Return the mean cross-entropy of the answer tokens, in nats."""
    return F.cross_entropy(logits_NV.float(), labels_N)


def kl_text(logits_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Return the mean KL(teacher || bridge) over the answer tokens; the teacher is the target that reads the text."""
    student_NV, teacher_NV = logits_NV.float().log_softmax(-1), teacher_NV.float().log_softmax(-1)
    return F.kl_div(student_NV, teacher_NV, log_target=True, reduction="batchmean")


def first_tokens(logits_NV: Tensor, labels_N: Tensor, weight_N: Tensor) -> Tensor:
    """Return the weighted mean cross-entropy Σ w ce / Σ w, in nats."""
    loss_N = F.cross_entropy(logits_NV.float(), labels_N, reduction="none")
    return (weight_N * loss_N).sum() / weight_N.sum()


def make_lm() -> Objective:
    """The cross-entropy of the answer."""
    return _cross_entropy("soft")


def make_autoencode() -> Objective:
    """The cross-entropy of the question, which the target is asked to repeat, and of the answer behind it."""
    return _cross_entropy("autoencode")


def make_readback() -> Objective:
    """The cross-entropy of the question, which the target is asked to repeat."""
    return _cross_entropy("readback")


def make_kl_text() -> Objective:
    """The divergence of the answer's prediction from the one that reads the text."""

    def loss(step: BridgeStep) -> Tensor:
        with torch.no_grad():
            teacher_NV = step.target.logits(step.batch["text"])
        return kl_text(step.logits_NV, teacher_NV)

    return Objective(loss, _count("soft"), needs=("text",))


def make_first_tokens(k: int = 10, factor: float = 100.0, text: Literal["answer", "question"] = "answer") -> Objective:
    """The cross-entropy, with more weight on the first tokens, which the target cannot predict from those before.

    Args:
        k: Number of tokens with more weight.
        factor: Their weight; the others have 1.
        text: What the target writes: the answer, or the question and the answer as in `autoencode`.
    """
    check_numbers("model.objectives.first_tokens", 1, SIZE, k=k)
    check_numbers("model.objectives.first_tokens", 1e-6, factor=factor)
    rows: RowsOf = "soft" if text == "answer" else "autoencode"

    def weight_N(step: BridgeStep) -> Tensor:
        return torch.where(step.batch[rows].place_N < k, factor, 1.0)

    def loss(step: BridgeStep) -> Tensor:
        return first_tokens(step.answered(rows), step.batch[rows].labels_N, weight_N(step))

    return Objective(loss, lambda step: weight_N(step).sum(), needs=() if rows == "soft" else (rows,))


def _cross_entropy(rows: RowsOf) -> Objective:
    def loss(step: BridgeStep) -> Tensor:
        return lm(step.answered(rows), step.batch[rows].labels_N)

    return Objective(loss, _count(rows), needs=() if rows == "soft" else (rows,))


def _count(rows: RowsOf) -> Callable[[BridgeStep], int]:
    return lambda step: len(step.batch[rows].labels_N)
