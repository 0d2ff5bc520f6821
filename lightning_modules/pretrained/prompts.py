"""Prompts and padded token tensors.

Shapes: B batch, T positions.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from datamodules.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


LONGEST = 65536  # tokens of an answer, far above any


class Prompt:
    """A text with one `{question}` in it, such as `"Question: {question}\\nAnswer:"`.

    Args:
        template: The text.

    Attributes:
        before: The text before the question.
        after: The text after the question.

    Raises:
        UserError: The template does not contain `{question}` exactly once.
    """

    def __init__(self, template: str):
        if template.count("{question}") != 1:
            raise UserError(
                f"the prompt needs one '{{question}}', where the question or its soft tokens go: {template!r}"
            )
        self.before, self.after = template.split("{question}")

    def fill(self, question: str) -> str:
        """Return the prompt with the question in it."""
        return f"{self.before}{question}{self.after}"


def encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Tokenize texts without special tokens; the caller adds BOS and EOS."""
    tokens: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return tokens


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Pad rows of tokens on the right to the longest row.

    Args:
        rows: The rows.
        value: The token that fills shorter rows.

    Returns:
        tokens_BT (int64) and mask_BT, which is True at real tokens.
    """
    width = max(map(len, rows))
    tokens_BT = torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
    mask_BT = torch.tensor([len(row) for row in rows])[:, None] > torch.arange(width)
    return tokens_BT, mask_BT
