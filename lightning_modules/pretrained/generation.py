"""Batched greedy generation by transformers.

Shapes: B batch, T positions, K vectors, D model width.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_modules.pretrained.causal_lm import inserted

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_modules.pretrained.loading import CausalLM

LOOK = 8  # new tokens between two looks for the stop text


@dataclass
class Answer:
    """A generated answer.

    Attributes:
        text: The text, without special tokens, and without the stop text and what follows it.
        is_cut: It ended at the length limit, with neither an end token nor the stop text.
    """

    text: str
    is_cut: bool


def end_tokens(model: "CausalLM", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return all tokens that end a text: the tokenizer's EOS, and those of the model's `generation_config`."""
    known = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])]
    return sorted({end for end in ends if end is not None})


@torch.no_grad()
def generate(
    model: "CausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    limit: int,
    stop: str | None = None,
    vectors_BKD: Tensor | None = None,
    columns: Sequence[Sequence[int]] | None = None,
) -> list[Answer]:
    """Continue each prompt greedily: with the token of the largest logit, whatever else the model's settings ask for.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: The tokens of each prompt, with the BOS token where training used one.
        limit: Largest number of new tokens.
        stop: A text that ends an answer.
        vectors_BKD: Vectors in the place of some tokens, see `lightning_modules.pretrained.causal_lm.inserted`.
        columns: For each token of each prompt the vector that takes its place, -1 for none.
    """
    from transformers import StoppingCriteriaList

    ends = end_tokens(model, tokenizer)
    filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (ends or [0])[0]
    width = max(map(len, prompts))
    lengths_B = torch.tensor([len(prompt) for prompt in prompts], device=model.device)
    tokens_BT, column_BT = (
        torch.tensor([[*[value] * (width - len(row)), *row] for row in rows], dtype=torch.long, device=model.device)
        for rows, value in ((prompts, filler), (columns or [[-1] * len(prompt) for prompt in prompts], -1))
    )
    mask_BT = torch.arange(width, device=model.device) >= width - lengths_B[:, None]
    criteria: list[Any] = [_Stop(tokenizer, stop, width)] if stop else []
    with _greedy(model, ends, filler) as settings, inserted(model, vectors_BKD, column_BT):
        rows: list[list[int]] = model.generate(
            input_ids=tokens_BT,
            attention_mask=mask_BT.long(),
            generation_config=settings,
            max_new_tokens=limit,
            stopping_criteria=StoppingCriteriaList(criteria),
        )[:, width:].tolist()
    return _answers(tokenizer, rows, ends, stop, limit)


def _answers(
    tokenizer: "PreTrainedTokenizerBase", rows: list[list[int]], ends: list[int], stop: str | None, limit: int
) -> list[Answer]:
    lengths = [next((i for i, token in enumerate(row) if token in ends), len(row)) for row in rows]
    texts: list[str] = tokenizer.batch_decode(
        [row[:length] for row, length in zip(rows, lengths, strict=True)], skip_special_tokens=True
    )
    answers = []
    for text, length in zip(texts, lengths, strict=True):
        kept, found, _ = text.partition(stop) if stop else (text, "", "")
        answers.append(Answer(kept.strip(), length == limit and not found))
    return answers


@contextmanager
def _greedy(model: "CausalLM", ends: list[int], filler: int) -> Iterator[Any]:
    """Put the model's `generation_config` aside: its beams, penalties and samples would fill what a call leaves out."""
    from transformers import GenerationConfig

    kept = model.generation_config
    make: Callable[..., GenerationConfig] = GenerationConfig
    settings = make(do_sample=False, num_beams=1, eos_token_id=ends or None, pad_token_id=filler)
    model.generation_config = settings
    try:
        yield settings
    finally:
        model.generation_config = kept


class _Stop:
    """Ends rows whose new text contains the stop text, which is looked for every few tokens."""

    def __init__(self, tokenizer: "PreTrainedTokenizerBase", stop: str, width: int):
        self.tokenizer, self.stop, self.width = tokenizer, stop, width
        self.done_B: Tensor | None = None

    def __call__(self, tokens_BT: Tensor, scores: Any, **options: Any) -> Tensor:
        """Return done_B, True at rows that have ended."""
        if self.done_B is None:
            self.done_B = torch.zeros(len(tokens_BT), dtype=torch.bool, device=tokens_BT.device)
        if (tokens_BT.shape[1] - self.width) % LOOK == 0:
            texts = self.tokenizer.batch_decode(tokens_BT[:, self.width :], skip_special_tokens=True)
            self.done_B = torch.tensor([self.stop in text for text in texts], device=tokens_BT.device)
        return self.done_B
