"""Prompts, and tokens as a tokenizer writes them.

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
CHAT = "chat"
QUESTION = "{question}"


class Prompt:
    """A text with one `{question}` in it, such as `"Question: {question}\\nAnswer:"`.

    Args:
        template: The text.
        name: The setting that holds it, for error messages.

    Attributes:
        before: The text before the question.
        after: The text after the question, without spaces at its end: tokenizers join a space with the next word.
        separator: The space between prompt and answer; empty if the prompt ends in another white space.
        has_special_tokens: Whether the text has all special tokens that the model needs, as a chat template has.

    Raises:
        UserError: The template does not contain `{question}` exactly once.
    """

    def __init__(self, template: str, name: str = "model.prompt"):
        if template.count(QUESTION) != 1:
            raise UserError(f"{name} needs one '{QUESTION}', where the question or its soft tokens go: {template!r}")
        self.before, after = template.split(QUESTION)
        self.after = after.rstrip(" ")
        self.separator = "" if self.after[-1:].isspace() else after[len(self.after) :] or " "
        self.has_special_tokens = False

    @classmethod
    def chat(cls, tokenizer: "PreTrainedTokenizerBase", name: str) -> "Prompt":
        """Return the chat template of a tokenizer around a question of the user.

        Args:
            tokenizer: The tokenizer.
            name: Where it comes from, for error messages.

        Raises:
            UserError: The tokenizer has no template that holds a single question unchanged.
        """
        if not tokenizer.chat_template:
            raise UserError(
                f"model.prompt '{CHAT}': the tokenizer of '{name}' has no chat template, write a prompt with {QUESTION}"
            )
        message = [{"role": "user", "content": QUESTION}]
        try:
            text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template is a program with errors of any class
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"model.prompt '{CHAT}': the chat template of '{name}' fails: {reason}") from error
        prompt = cls(str(text))
        prompt.after, prompt.separator, prompt.has_special_tokens = str(text).split(QUESTION)[1], "", True
        return prompt

    @property
    def stop(self) -> str | None:
        """The text with which a model goes on to the next question; None if the prompt has no such text.

        It is the last line before the question, if that has a letter and ends in a mark: `Question:`, `[INST]`. Marks
        alone, such as `##`, also occur in answers.
        """
        line = self.before.strip().rpartition("\n")[2].strip()
        is_sign = any(map(str.isalpha, line)) and not line[-1].isalnum()
        return line if is_sign and not self.has_special_tokens else None

    def fill(self, question: str) -> str:
        """Return the prompt with the question in it."""
        return f"{self.before}{question}{self.after}"


def encode(tokenizer: "PreTrainedTokenizerBase", texts: Sequence[str]) -> list[list[int]]:
    """Tokenize texts without the special tokens that the tokenizer would add."""
    tokens: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return tokens


def added_tokens(tokenizer: "PreTrainedTokenizerBase") -> tuple[list[int], list[int]]:
    """Return the special tokens that a tokenizer writes before and after a text.

    A tokenizer that has a BOS token and does not write it gets it before the text, as causal models are trained.
    """
    whole: list[int] = tokenizer("x")["input_ids"]
    bare = encode(tokenizer, ["x"])[0]
    starts = [start for start in range(len(whole)) if whole[start : start + len(bare)] == bare]
    before, after = (whole[: starts[0]], whole[starts[0] + len(bare) :]) if starts else ([], [])
    if not before and tokenizer.bos_token_id is not None:
        before = [tokenizer.bos_token_id]
    return before, after


def with_added(tokens: list[int], before: list[int]) -> list[int]:
    """Return tokens behind the special tokens `before`, which are not doubled if the text begins with them."""
    return tokens if tokens[: len(before)] == before else before + tokens


def check_tokens(rows: Sequence[Sequence[int]], size: int, owner: str, path: str) -> None:
    """Check that a model has every token of some rows.

    Args:
        rows: The rows.
        size: The number of the model's tokens.
        owner: The setting of the model, such as `model.source`.
        path: Where the model comes from.

    Raises:
        UserError: It has not: the tokenizer is another model's, or got tokens that the model did not.
    """
    largest = max((token for row in rows for token in row), default=0)
    if largest >= size:
        raise UserError(
            f"{owner}: the tokenizer writes token {largest}, and '{path}' has tokens 0 to {size - 1} only: "
            f"name the model's own tokenizer in {owner}.tokenizer"
        )


def continued(
    tokenizer: "PreTrainedTokenizerBase", firsts: Sequence[str], seconds: Sequence[str]
) -> list[tuple[list[int], list[int]]]:
    """Tokenize each first text, and the second one as the tokenizer writes it behind the first.

    A token that would span both is never used: the model that reads the first text continues it with the second.
    """
    tokens = zip(
        encode(tokenizer, firsts),
        encode(tokenizer, [first + second for first, second in zip(firsts, seconds, strict=True)]),
        seconds,
        strict=True,
    )
    return [
        (first, whole[len(first) :] if whole[: len(first)] == first else encode(tokenizer, [second])[0])
        for first, whole, second in tokens
    ]


def behind(
    tokenizer: "PreTrainedTokenizerBase", before: str, texts: Sequence[str]
) -> tuple[list[list[int]], list[int]]:
    """Tokenize `before text` as one text, and find the first token that holds a character of the text.

    The space before the text belongs to the text. So does a token that spans both.

    Returns:
        The tokens of each whole, and the index of this token.
    """
    wholes = encode(tokenizer, [before + text for text in texts])
    return wholes, starts_behind(tokenizer, before, wholes)


def starts_behind(tokenizer: "PreTrainedTokenizerBase", before: str, wholes: Sequence[list[int]]) -> list[int]:
    """Return the index that `behind` finds in the tokens of each whole."""
    head = encode(tokenizer, [before.rstrip(" ")])[0] if before.strip(" ") else []
    return [_equal_at_the_start(head, whole) for whole in wholes]


def _equal_at_the_start(first: list[int], second: list[int]) -> int:
    shorter = min(len(first), len(second))
    return next((i for i in range(shorter) if first[i] != second[i]), shorter)


def pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """Pad rows of tokens on the right to the longest row.

    Args:
        rows: The rows.
        value: The token that fills shorter rows.

    Returns:
        tokens_BT (int64) and mask_BT, which is True at real tokens.
    """
    width = max(map(len, rows))
    tokens_BT = torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.long)
    mask_BT = torch.tensor([len(row) for row in rows])[:, None] > torch.arange(width)
    return tokens_BT, mask_BT
