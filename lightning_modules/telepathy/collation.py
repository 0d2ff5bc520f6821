"""From problems to batches, in the tokens of both models."""

from collections.abc import Collection, Sequence
from typing import cast

from datamodules.problems import Problem
from lightning_modules.pretrained.prompts import pad
from lightning_modules.telepathy.batch import EvaluationBatch, TelepathyBatch, TrainingBatch
from lightning_modules.telepathy.bridges import Bridge
from lightning_modules.telepathy.flaws import padded
from lightning_modules.telepathy.source import Source
from lightning_modules.telepathy.target import Target
from lightning_modules.telepathy.text_prefix import TextPrefix


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
    soft_rows = target.soft_rows(questions, answers)
    rows = {"soft": soft_rows}
    if "autoencode" in needs:
        rows["autoencode"] = target.autoencode_rows(questions, answers)
    if "readback" in needs:
        rows["readback"] = target.readback_rows(questions)
    if padding_labels:
        rows = {name: padded(some) for name, some in rows.items()}
    packed = {name: target.pack(some, batch["soft_mask"]) for name, some in rows.items()}
    made = cast(TrainingBatch, {**batch, **packed})
    if "question" in needs:
        made["question"], made["question_mask"] = pad(target.question_tokens(questions), 0)
    if "answer" in needs:
        made["answer"], made["answer_mask"] = pad([row.answer for row in soft_rows], 0)
    text_rows = target.text_rows(questions, answers) if "text" in needs or prefix is not None else []
    if "text" in needs:
        made["text"] = target.pack(text_rows)
    if prefix is not None:
        made["prefixed"] = target.pack(text_rows, prefix.mask(len(problems)))
    return made


def evaluation_batch(problems: Sequence[Problem], source: Source, target: Target, bridge: Bridge) -> EvaluationBatch:
    """Return problems with the target's rows for soft tokens and for text; the arguments are as for training."""
    questions, answers = _texts(problems)
    return EvaluationBatch(
        **_source_batch(questions, source, bridge),
        problems=problems,
        soft_rows=target.soft_rows(questions, answers, training=False),
        text_rows=target.text_rows(questions, answers),
    )


def _texts(problems: Sequence[Problem]) -> tuple[list[str], list[str]]:
    return [problem.question for problem in problems], [problem.answer for problem in problems]


def _source_batch(questions: Sequence[str], source: Source, bridge: Bridge) -> TelepathyBatch:
    read = source.tokenize(questions)
    return TelepathyBatch(**read, soft_mask=bridge.soft_mask(read["source_mask"]))
