"""From generated tokens to answers: where one ends, and its text.

Shapes: B batch, N new tokens.
"""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass
class Answer:
    """A generated answer.

    Attributes:
        text: The text, without special tokens, and without the stop text and what follows it.
        is_cut: It ended at the length limit, with neither an end token nor the stop text.
    """

    text: str
    is_cut: bool


def answers_of(
    tokenizer: "PreTrainedTokenizerBase", rows: list[list[int]], ends: list[int], stop: str | None, limit: int
) -> list[Answer]:
    """Return rows of new tokens as answers.

    Args:
        tokenizer: The tokenizer.
        rows: The new tokens of each row.
        ends: The tokens that end a text.
        stop: A text that ends an answer.
        limit: Largest number of new tokens.
    """
    lengths = [next((i for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    texts = _texts(tokenizer, [row[:length] for row, length in zip(rows, lengths, strict=True)])
    answers = []
    for text, length in zip(texts, lengths, strict=True):
        end = _place(stop, text)
        answers.append(Answer(text[:end].strip(), length == limit and end is None))
    return answers


def have_ended(tokenizer: "PreTrainedTokenizerBase", ends: list[int], stop: str | None, tokens_BN: Tensor) -> Tensor:
    """Return ended_B, True at rows whose new tokens have an end token or the stop text."""
    ended_B = torch.isin(tokens_BN, torch.tensor(ends, dtype=torch.long, device=tokens_BN.device)).any(1)
    if stop:
        found = [_place(stop, text) is not None for text in _texts(tokenizer, tokens_BN.tolist())]
        ended_B |= torch.tensor(found, device=tokens_BN.device)
    return ended_B


def written(tokenizer: "PreTrainedTokenizerBase", stop: str | None) -> str | None:
    """Return a stop text as it stands in answers, which lack special tokens; None if only marks are left of it."""
    rest = stop or ""
    for token in tokenizer.all_special_tokens:
        rest = rest.replace(token, "").strip()
    return rest if rest == stop or any(map(str.isalpha, rest)) else None


def _texts(tokenizer: "PreTrainedTokenizerBase", rows: list[list[int]]) -> list[str]:
    """Return rows as texts, without special tokens and without those that only the model has."""
    size = len(tokenizer)
    texts: list[str] = tokenizer.batch_decode(
        [[token for token in row if token < size] for row in rows], skip_special_tokens=True
    )
    return texts


def _place(stop: str | None, text: str) -> int | None:
    """Return where the stop text begins, which is not within a word; None if nowhere."""
    found = re.search(rf"(?<!\w(?=\w)){re.escape(stop)}", text) if stop else None
    return found.start() if found else None
