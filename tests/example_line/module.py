"""A fifth line of research, as an example: what does a recurrent state carry?"""

from typing import Any

from lightning_modules.core.sequence_model import SequenceModel
from lightning_modules.core.sizes import check_sizes
from tests.example_line.network import GRU


class Recurrence(SequenceModel):
    """A GRU that predicts the next token.

    Args:
        vocab_size: Tokens of the data.
        seq_len: Longest sequence of the data.
        width: Width of the state.
        **common: The arguments of `SequenceModel`.
    """

    def __init__(self, vocab_size: int, seq_len: int, width: int = 64, **common: Any):
        check_sizes(width=width)
        self.width = width
        super().__init__(vocab_size, seq_len, **common)

    def make_network(self) -> GRU:
        """Return a GRU with random weights."""
        return GRU(self.vocab_size, self.width)
