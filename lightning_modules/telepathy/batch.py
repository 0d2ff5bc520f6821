"""The batches of the telepathy line.

Shapes: B batch, K soft tokens, Q target tokens of the question. `SourceBatch` has the other shapes.
"""

from collections.abc import Sequence
from typing import NotRequired

from torch import Tensor

from datamodules.problems import Problem
from lightning_modules.telepathy.layout import Packing, Row
from lightning_modules.telepathy.source import SourceBatch


class TelepathyBatch(SourceBatch):
    """The questions of a batch, in tokens of the source.

    Attributes:
        soft_mask: True at real soft tokens, [B, K].
    """

    soft_mask: Tensor


class TrainingBatch(TelepathyBatch):
    """A batch with packed rows around the soft tokens, and with the text where something needs it.

    Attributes:
        soft: The rows with soft tokens.
        question: Target tokens of the question, [B, Q].
        question_mask: True at real tokens of `question`, [B, Q].
        aligned: Target tokens of the question, each at a soft token of the source token in which it begins, [B, K].
        aligned_mask: True where there is one, [B, K].
        answer: Target tokens of the answer, [B, Q].
        answer_mask: True at real tokens of `answer`, [B, Q].
        text: The rows with the question's text.
        autoencode: Rows with soft tokens, in which the question is to be repeated and answered.
        readback: Rows with soft tokens, in which the question is to be repeated.
        prefixed: The rows with a learned prefix before the question's text.
    """

    soft: Packing
    question: NotRequired[Tensor]
    question_mask: NotRequired[Tensor]
    aligned: NotRequired[Tensor]
    aligned_mask: NotRequired[Tensor]
    answer: NotRequired[Tensor]
    answer_mask: NotRequired[Tensor]
    text: NotRequired[Packing]
    autoencode: NotRequired[Packing]
    readback: NotRequired[Packing]
    prefixed: NotRequired[Packing]


class EvaluationBatch(TelepathyBatch):
    """A batch with its problems.

    Attributes:
        problems: The problems, one per row.
        soft_rows: The target's rows for soft tokens.
        text_rows: The target's rows with the question's text.
    """

    problems: Sequence[Problem]
    soft_rows: list[Row]
    text_rows: list[Row]
