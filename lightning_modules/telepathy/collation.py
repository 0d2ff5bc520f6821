"""From problems to batches, in the tokens of both models."""

from collections.abc import Collection, Sequence
from typing import Literal, cast

from torch import Tensor

from datamodules.errors import UserError
from datamodules.problems import Problem
from lightning_modules.pretrained.prompts import pad
from lightning_modules.telepathy.alignment import aligned
from lightning_modules.telepathy.batch import EvaluationBatch, TelepathyBatch, TrainingBatch
from lightning_modules.telepathy.bridges import Bridge
from lightning_modules.telepathy.flaws import padded
from lightning_modules.telepathy.flow import FlowBridge
from lightning_modules.telepathy.layout import Row
from lightning_modules.telepathy.source import Source
from lightning_modules.telepathy.target import Target
from lightning_modules.telepathy.text_prefix import TextPrefix

RowsName = Literal["soft", "autoencode", "readback", "text", "prefixed"]
AROUND_SOFT: tuple[RowsName, ...] = ("soft", "autoencode", "readback")  # rows with the soft tokens in them


def training_batch(
    problems: Sequence[Problem],
    source: Source,
    target: Target,
    bridge: Bridge,
    needs: Collection[str],
    prefix: TextPrefix | None,
    padding_labels: bool = False,
) -> TrainingBatch:
    """Return problems with packed rows.

    Args:
        problems: The problems.
        source: The model that reads.
        target: The model that answers.
        bridge: The bridge, which tells the number of soft tokens.
        needs: What the objectives read beside the rows with soft tokens.
        prefix: The learned prefix of the text baseline, if there is one.
        padding_labels: Reproduce the notes' labels: answers are padded with end tokens, and these are labels too.
    """
    questions, answers = _texts(problems)
    batch = _source_batch(questions, source, bridge)
    rows = _target_rows(questions, answers, target, needs, prefix)
    made = cast(TrainingBatch, {**batch})
    if "question" in needs:
        made["question"], made["question_mask"] = pad(target.rows.question_tokens(questions), 0)
    if "aligned" in needs:
        assert isinstance(bridge, FlowBridge)  # the module has checked it
        made["aligned"], made["aligned_mask"] = aligned(questions, source, target, bridge.positions())
    if "answer" in needs:
        made["answer"], made["answer_mask"] = pad([row.answer for row in rows["soft"]], 0)
    if padding_labels:
        rows |= {name: padded(rows[name]) for name in AROUND_SOFT if name in rows}
    masks = _vector_masks(batch["soft_mask"], prefix)
    return cast(TrainingBatch, {**made, **{name: target.pack(some, masks.get(name)) for name, some in rows.items()}})


def row_lengths(
    problems: Sequence[Problem],
    source: Source,
    target: Target,
    bridge: Bridge,
    needs: Collection[str],
    prefix: TextPrefix | None,
    padding_labels: bool = False,
) -> list[int]:
    """Return for each problem the tokens of its longest row in a training batch; the arguments are as for the batch.

    Raises:
        UserError: With `padding_labels` the length of a row depends on the other rows.
    """
    if padding_labels:
        raise UserError(
            "data.max_tokens: with the flaw padding_labels a row is as long as others of its batch, leave it out"
        )
    questions, answers = _texts(problems)
    read = source.tokens(questions)
    masks = _vector_masks(bridge.soft_mask(read["source_mask"]), prefix)
    lengths: list[list[int]] = [read["source_real"].sum(1).tolist()]
    for name, rows in _target_rows(questions, answers, target, needs, prefix).items():
        counts = masks[name].sum(1).tolist() if name in masks else [0] * len(rows)
        lengths.append([row.length(count) for row, count in zip(rows, counts, strict=True)])
    return [max(of_problem) for of_problem in zip(*lengths, strict=True)]


def _vector_masks(soft_mask_BK: Tensor, prefix: TextPrefix | None) -> dict[RowsName, Tensor]:
    """Return which vectors are real in each kind of rows that has vectors."""
    masks: dict[RowsName, Tensor] = dict.fromkeys(AROUND_SOFT, soft_mask_BK)
    return masks if prefix is None else masks | {"prefixed": prefix.mask(len(soft_mask_BK))}


def _target_rows(
    questions: Sequence[str], answers: Sequence[str], target: Target, needs: Collection[str], prefix: TextPrefix | None
) -> dict[RowsName, list[Row]]:
    """Return all rows of the target by their names in a training batch."""
    rows: dict[RowsName, list[Row]] = {"soft": target.rows.soft(questions, answers)}
    if "autoencode" in needs:
        rows["autoencode"] = target.rows.autoencode(questions, answers)
    if "readback" in needs:
        rows["readback"] = target.rows.readback(questions)
    if "text" in needs or prefix is not None:
        text_rows = target.rows.text(questions, answers)
        rows |= {"text": text_rows} if "text" in needs else {}
        rows |= {"prefixed": text_rows} if prefix is not None else {}
    return rows


def evaluation_batch(problems: Sequence[Problem], source: Source, target: Target, bridge: Bridge) -> EvaluationBatch:
    """Return problems with the target's rows for soft tokens and for text; the arguments are as for training."""
    questions, answers = _texts(problems)
    return EvaluationBatch(
        **_source_batch(questions, source, bridge),
        problems=problems,
        soft_rows=target.rows.soft(questions, answers, training=False),
        text_rows=target.rows.text(questions, answers),
    )


def _texts(problems: Sequence[Problem]) -> tuple[list[str], list[str]]:
    return [problem.question for problem in problems], [problem.answer for problem in problems]


def _source_batch(questions: Sequence[str], source: Source, bridge: Bridge) -> TelepathyBatch:
    read = source.tokenize(questions)
    return TelepathyBatch(**read, soft_mask=bridge.soft_mask(read["source_mask"]))
