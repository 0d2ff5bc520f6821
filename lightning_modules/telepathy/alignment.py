"""Target tokens at the soft tokens of the source token within which they begin.

Shapes: B batch, K soft tokens.
"""

from bisect import bisect_right
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from datamodules.errors import UserError
from lightning_modules.pretrained.prompts import starts_behind
from lightning_modules.telepathy.source import Source
from lightning_modules.telepathy.target import Target

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NONE = -1  # a soft token without a target token


def tokens_and_ends(
    tokenizer: "PreTrainedTokenizerBase", before: str, texts: Sequence[str]
) -> tuple[list[list[int]], list[list[int]]]:
    """Return the tokens of each text behind `before`, and the character of the text behind which each of them ends.

    Raises:
        UserError: The tokenizer does not say which characters a token holds.
    """
    if not tokenizer.is_fast:
        raise UserError("model.objectives.flow needs fast tokenizers, which say which characters a token holds")
    wholes = [before + text for text in texts]
    encoded = tokenizer(wholes, add_special_tokens=False, return_offsets_mapping=True)
    tokens, offsets = encoded["input_ids"], encoded["offset_mapping"]
    starts = starts_behind(tokenizer, before, tokens)
    ends = [[end - len(before) for _, end in row[start:]] for row, start in zip(offsets, starts, strict=True)]
    return [row[start:] for row, start in zip(tokens, starts, strict=True)], ends


def slots(target_ends: Sequence[int], source_ends: Sequence[int], place_K: Sequence[int]) -> list[int]:
    """Return for each soft token the index of its target token, or -1.

    A target token begins where the one before it ends. Those that begin within one source token take its soft tokens
    in their order, and those that find none free are left out. A source token without soft tokens of its own shares
    those of the source token before it.

    Args:
        target_ends: Where each target token ends.
        source_ends: Where each source token ends.
        place_K: The source token of each soft token, in ascending order.
    """
    found, taken = [NONE] * len(place_K), Counter[int]()
    for index, start in enumerate([0, *target_ends[:-1]]):
        last = bisect_right(place_K, bisect_right(source_ends, start)) - 1
        first = place_K.index(place_K[last])
        if first + taken[first] <= last:
            found[first + taken[first]] = index
            taken[first] += 1
    return found


def aligned(questions: Sequence[str], source: Source, target: Target, place_K: Tensor) -> tuple[Tensor, Tensor]:
    """Return the target's tokens_BK of questions at their soft tokens (`slots`), and mask_BK, True where there is one.

    Raises:
        UserError: A tokenizer does not say which characters a token holds.
    """
    tokens, of_target = tokens_and_ends(target.tokenizer, target.prompt.before, questions)
    _, of_source = tokens_and_ends(source.tokenizer, source.before, questions)
    index_BK = torch.tensor([slots(*both, place_K.tolist()) for both in zip(of_target, of_source, strict=True)])
    rows = [[row[i] for i in index] for row, index in zip(tokens, index_BK.tolist(), strict=True)]
    return torch.tensor(rows) * (index_BK != NONE), index_BK != NONE
