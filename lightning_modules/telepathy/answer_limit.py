"""The length limit of generated answers, from the reference answers of the data."""

from typing import Protocol, runtime_checkable

from datamodules.errors import UserError
from lightning_modules.pretrained.prompts import encode
from lightning_modules.telepathy.target import Target

BARE = 32  # tokens of an answer at most, of data that gives results alone
WORKED = 256  # tokens to work out the answers of such data


@runtime_checkable
class HasAnswers(Protocol):
    """A datamodule that knows the reference answers of its problems."""

    def answers(self) -> list[str]:
        """Return the answers of the fixed sets, the same on every rank."""


def longest_answer(target: Target, data: object) -> int:
    """Return the tokens of the longest reference answer with its end token, or 256 where answers are bare results.

    Args:
        target: The model that answers.
        data: The datamodule.

    Raises:
        UserError: The datamodule has no reference answers.
    """
    if not isinstance(data, HasAnswers):
        raise UserError(f"model.max_new_tokens must be set: {type(data).__name__} has no reference answers")
    texts = [target.prompt.separator + answer for answer in data.answers()]
    longest = max(map(len, encode(target.tokenizer, texts)), default=0) + 1  # the end token
    return longest if longest > BARE else WORKED


def check_limit(target: Target, limit: int | None) -> None:
    """Check that an answer of so many tokens can stand behind some prompt.

    Raises:
        UserError: The model has no more positions than that.
    """
    if limit is not None and target.positions is not None and limit >= target.positions:
        raise UserError(f"model.max_new_tokens must be below {target.positions}, the positions of '{target.path}'")
