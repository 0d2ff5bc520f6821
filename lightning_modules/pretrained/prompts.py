"""Prompts and padded token tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from datamodules.errors import UserError


class Prompt:
    """A text with a `{question}` in it, cut there: `"Question: {question}\\nAnswer:"`.

    Args:
        template: The text.

    Raises:
        UserError: There is not exactly one `{question}`.
    """

    def __init__(self, template: str):
        if template.count("{question}") != 1:
            raise UserError(
                f"the prompt needs one '{{question}}', where the question or its soft tokens go: {template!r}"
            )
        self.before, self.after = template.split("{question}")

    def fill(self, question: str) -> str:
        """The prompt as text."""
        return f"{self.before}{question}{self.after}"


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokenize without adding special tokens: where BOS and EOS go is decided once, by the caller."""
    return tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Right-pad rows of tokens: (tokens_BT, mask_BT)."""
    width = max(map(len, rows))
    tokens_BT = torch.tensor([[*row, *[value] * (width - len(row))] for row in rows])
    mask_BT = torch.tensor([len(row) for row in rows])[:, None] > torch.arange(width)
    return tokens_BT, mask_BT
