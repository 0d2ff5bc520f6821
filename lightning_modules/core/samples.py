"""Generated answers: the samples of an evaluation, gathered over ranks, written to files and shown as tables."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from itertools import zip_longest
from pathlib import Path
from typing import Any, TypeVar

import torch

from lightning_modules.core.files import replacing

T = TypeVar("T")
_MARKDOWN = re.compile(r"([\\`*_\[\]|])")


@dataclass
class EvalSample:
    """One generated answer beside its question and reference.

    Attributes:
        prompt: The input of the model, as text.
        reference: The reference answer.
        output: The generated answer.
        scores: Measure -> score of this sample; proportions as 0.0 or 1.0. A measure that does not apply to this sample
            is absent, so means run over the samples to which it applies.
    """

    prompt: str
    reference: str
    output: str
    scores: dict[str, float] = field(default_factory=dict)


def gather_objects(item: T) -> list[T]:
    """Return the items of all ranks, in the order of the ranks; every rank must call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [item]
    items: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(items, item)
    return items


def gather_dealt(items: Sequence[T]) -> list[T]:
    """Return the items of all ranks in the order in which they were dealt to the ranks one by one; none is None."""
    parts = gather_objects(items)
    return [item for row in zip_longest(*parts) for item in row if item is not None]


def write_jsonl(path: Path, samples: Sequence[EvalSample]) -> None:
    """Write one sample per line; a reader sees all samples or none."""
    lines = [json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples]
    with replacing(path) as draft:
        draft.write_text("".join(lines), encoding="utf-8")


def text_table(samples: Sequence[EvalSample]) -> str:
    """Return the samples as a markdown table that shows every text unchanged."""
    rows = [["question", "reference", "output", "scores"], ["---"] * 4]
    for sample in samples:
        scores = ", ".join(f"{name} {score:.3g}" for name, score in sample.scores.items())
        rows.append([_cell(text) for text in (sample.prompt, sample.reference, sample.output, scores)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(text: str) -> str:
    # A worked answer is full of << >> and *, which a browser takes for tags and markdown for emphasis.
    return "<br>".join(_MARKDOWN.sub(r"\\\1", escape(text, quote=False)).splitlines())
