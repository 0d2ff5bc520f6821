"""What a language model can read: its tokens, and the positions of a row."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from datamodules.errors import UserError
from lightning_modules.pretrained.causal_lm import vocabulary
from lightning_modules.pretrained.positions import positions
from lightning_modules.pretrained.prompts import check_tokens

if TYPE_CHECKING:
    from lightning_modules.pretrained.loading import CausalLM


@dataclass(frozen=True)
class Limits:
    """The largest rows of a model.

    Attributes:
        tokens: Number of tokens.
        positions: Longest row; None without a limit.
        path: Where the model comes from; None for a new one.
    """

    tokens: int
    positions: int | None
    path: str | None

    @classmethod
    def of(cls, model: "CausalLM", path: str | None) -> "Limits":
        """Return the limits of a model."""
        return cls(vocabulary(model), positions(model), path)

    def check(self, rows: Sequence[Sequence[int]], answer: int = 0) -> None:
        """Check rows of tokens.

        Args:
            rows: The rows.
            answer: Tokens that the model may write behind each row.

        Raises:
            UserError: The model lacks a token, or has too few positions for the longest row.
        """
        if self.path is not None:  # a new model has at least the tokens of its tokenizer
            check_tokens(rows, self.tokens, "model.pretrained", self.path)
        length = max(map(len, rows)) + answer
        if self.positions is not None and length > self.positions:
            remark = f", {answer} of them for the answer (model.max_new_tokens)" if answer else ""
            place = f"model.pretrained: '{self.path}' has" if self.path else "model.config.max_position_embeddings is"
            raise UserError(f"{place} {self.positions}, and a row takes {length} positions{remark}")
