"""The batches of the telepathy line, and how they are made from problems.

Shapes: B batch, P positions of the source's prompt, S source positions of the question, K soft tokens, Q target tokens
of the question, A target positions after the body.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, NotRequired, TypedDict, cast

from torch import Tensor

from datamodules.problems import Problem
from lightning_modules.pretrained.prompts import Prompt, pad
from lightning_modules.telepathy.bridges import Bridge
from lightning_modules.telepathy.layout import Packing, cut, pack
from lightning_modules.telepathy.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class TelepathyBatch(TypedDict):
    """The questions of a batch, in tokens of source and target.

    Attributes:
        source: Source tokens: BOS, prompt and question, [B, P + S].
        source_mask: True at real tokens of the question, [B, S].
        soft_mask: True at real soft tokens, [B, K].
        text: Target tokens of the question, [B, Q].
        text_mask: True at real tokens of `text`, [B, Q].
    """

    source: Tensor
    source_mask: Tensor
    soft_mask: Tensor
    text: Tensor
    text_mask: Tensor


class TrainingBatch(TelepathyBatch):
    """A batch with packed rows around the soft tokens, and around the text if an objective needs them.

    Attributes:
        soft_tail: Target tokens after the soft tokens, answer included, [B, A].
        soft_packing: The packing of prompt, soft tokens and tail.
        text_tail: Target tokens after the text, answer included, [B, A].
        text_packing: The packing of prompt, text and tail.
    """

    soft_tail: Tensor
    soft_packing: Packing
    text_tail: NotRequired[Tensor]
    text_packing: NotRequired[Packing]


class EvaluationBatch(TelepathyBatch):
    """A batch with its problems.

    Attributes:
        problems: The problems, one per row.
        answers: Target tokens of each answer, EOS last.
    """

    problems: Sequence[Problem]
    answers: list[list[int]]


def tokenize(
    problems: Sequence[Problem],
    prompt: Prompt,
    source_tokenizer: "PreTrainedTokenizerBase",
    target: Target,
    bridge: Bridge,
) -> tuple[TelepathyBatch, list[list[int]]]:
    """Tokenize problems for both models.

    Returns:
        The batch of questions, and the target tokens of each answer, EOS last.
    """
    questions, answers = [problem.question for problem in problems], [problem.answer for problem in problems]
    source = cut(source_tokenizer, prompt, questions, [""] * len(problems))
    texts = cut(target.tokenizer, prompt, questions, answers)
    bos, eos = source_tokenizer.bos_token_id, target.tokenizer.eos_token_id
    _, source_mask_BS = pad([row.question for row in source], 0)
    source_BT, _ = pad([[bos, *row.before, *row.question] for row in source], 0)
    text_BQ, text_mask_BQ = pad([row.question for row in texts], 0)
    batch = TelepathyBatch(
        source=source_BT,
        source_mask=source_mask_BS,
        soft_mask=bridge.soft_mask(source_mask_BS),
        text=text_BQ,
        text_mask=text_mask_BQ,
    )
    return batch, [[*row.answer, eos] for row in texts]


def pack_rows(batch: TelepathyBatch, answers: list[list[int]], target: Target, needs_text: bool) -> TrainingBatch:
    """Add the packed rows around the soft tokens to a batch of questions; with `needs_text`, around the text too."""
    rows: dict[str, Tensor | Packing] = {}
    frame = target.soft_frame
    rows["soft_tail"], rows["soft_packing"] = pack(len(frame.head), batch["soft_mask"], frame.after, answers)
    if needs_text:
        frame = target.text_frame
        rows["text_tail"], rows["text_packing"] = pack(len(frame.head), batch["text_mask"], frame.after, answers)
    return cast(TrainingBatch, {**batch, **rows})
