"""What a module hands over when it is evaluated by generation, and how samples of all ranks are kept and shown."""

import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from html import escape
from pathlib import Path
from typing import Any

import torch

_MARKDOWN = re.compile(r"([\\`*_\[\]|])")


@dataclass
class EvalSample:
    """One generated answer beside what was asked.

    Attributes:
        prompt: What the model was given, as text.
        reference: The answer that was wanted.
        output: The answer that came.
        scores: Per-sample scores by measure; proportions as 0.0 or 1.0. A measure that does not
            apply to this sample is left out, so that means run over the samples that it applies to.
    """

    prompt: str
    reference: str
    output: str
    scores: dict[str, float] = field(default_factory=dict)


def gather_objects(mine: Any) -> list[Any]:
    """Return what each rank passed, in order of rank; every rank has to call it."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return [mine]
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, mine)
    return parts


def write_jsonl(path: Path, samples: Sequence[EvalSample]) -> None:
    """Write one sample a line; a reader sees all of them or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_suffix(".jsonl.tmp")
    lines = [json.dumps(asdict(sample), ensure_ascii=False) + "\n" for sample in samples]
    draft.write_text("".join(lines), encoding="utf-8")
    draft.replace(path)


def text_table(samples: Sequence[EvalSample]) -> str:
    """The samples as a markdown table that shows every text as it is."""
    rows = [["question", "reference", "output", "scores"], ["---"] * 4]
    for sample in samples:
        scores = ", ".join(f"{name} {score:.3g}" for name, score in sample.scores.items())
        rows.append([_cell(text) for text in (sample.prompt, sample.reference, sample.output, scores)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _cell(text: str) -> str:
    # A worked answer is full of << >> and *, which a browser would take for tags and markdown for emphasis.
    return "<br>".join(_MARKDOWN.sub(r"\\\1", escape(text, quote=False)).splitlines())
