"""What a batch of token sequences is, and what a datamodule asks of the module that it feeds.

Shapes: S ensemble members, B rows, T positions.
"""

from collections.abc import Sequence
from typing import Any, Protocol, TypedDict, runtime_checkable

from torch import Tensor

IGNORE = -100  # the label of a position where nothing is asked


class TokenBatch(TypedDict):
    """Rows of tokens with their labels, int64 [B, T], or [S, B, T] where each ensemble member has rows of its own.

    Attributes:
        tokens: The tokens.
        labels: What the logits at each position should predict, aligned with the logits: `labels[t]` belongs to
            `logits[t]`. `IGNORE` where nothing is asked.
    """

    tokens: Tensor
    labels: Tensor


@runtime_checkable
class HasEnsemble(Protocol):
    """A module that trains S seeds as one program; S is 1 for an ordinary module."""

    ensemble: int


@runtime_checkable
class HasWidth(Protocol):
    """A module with a residual stream of `width` features."""

    width: int


@runtime_checkable
class SupportsCollate(Protocol):
    """A module that makes its own batches of samples in words."""

    def collate(self, problems: Sequence[Any], training: bool) -> dict[str, Any]:
        """Return a batch."""
        ...
