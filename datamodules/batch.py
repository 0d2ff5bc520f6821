"""What a batch of token sequences is.

Shapes: S ensemble members, B rows, T positions.
"""

from typing import TypedDict

from torch import Tensor

IGNORE = -100  # the label of a position where nothing is asked


class TokenBatch(TypedDict):
    """Rows of tokens with their labels, int64 [B, T], or [S, B, T] where each ensemble member has rows of its own.

    Attributes:
        tokens: The tokens.
        labels: What the logits at each position should predict, aligned with the logits; `IGNORE` where nothing is
            asked.
    """

    tokens: Tensor
    labels: Tensor
