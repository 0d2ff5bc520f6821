"""A language whose best possible loss is known: each token is followed by the next number, or by a random one.

Shapes: B rows, T positions, U = T + 1 tokens of a row with the token that follows.
"""

import math
from typing import Any

import numpy as np

from datamodules.batch import Integers
from datamodules.errors import SIZE, check_numbers
from datamodules.sequence_task import SequenceTask, label_next
from datamodules.token_rows import parse_numbers


class NoisySuccessor(SequenceTask):
    """Token n is followed by n + 1 (modulo V), except that with probability `jump` a random token follows.

    A row with `vocab_size` 10 and `seq_len` 8::

        tokens  3 4 5 0 1 2 3 7
        labels  4 5 0 1 2 3 7 8

    The successor follows with probability p = 1 - jump + jump / V, and each other token with r = jump / V. The best
    possible accuracy is p, and the best possible loss is `best_loss` = -p ln p - (V - 1) r ln r nats.

    Args:
        vocab_size: V.
        jump: Probability that the next token is drawn at random, of all tokens.
        seq_len: T.
        **common: Arguments of `SequenceTask`.

    Attributes:
        best_loss: Entropy of the next token, in nats.
    """

    predicts_next = True

    def __init__(self, vocab_size: int = 900, jump: float = 0.3, seq_len: int = 64, **common: Any):
        super().__init__(**common)
        check_numbers("data", 2, SIZE, vocab_size=vocab_size)
        check_numbers("data", 1, SIZE, seq_len=seq_len)
        check_numbers("data", 0, 1, jump=jump)
        self.vocab_size, self.jump, self.seq_len = vocab_size, jump, seq_len
        self.chance, self.ceiling = 1 / vocab_size, 1 - jump + jump / vocab_size
        shares = [(1, self.ceiling), (vocab_size - 1, jump / vocab_size)]
        self.best_loss = -sum(tokens * share * math.log(share) for tokens, share in shares if share)

    def randomness(self, rng: np.random.Generator, count: int) -> tuple[Integers, ...]:
        """Draw where rows jump, and a token for each position."""
        size = count, self.seq_len + 1
        return (rng.random(size) < self.jump).astype(int), rng.integers(self.vocab_size, size=size)

    def rows(self, *drawn: Integers) -> Integers:
        """Count on from the token of the last jump, rows_B2T."""
        jump_BU, token_BU = drawn
        place_U = np.arange(jump_BU.shape[1])
        last_BU = np.maximum.accumulate(place_U * jump_BU, axis=1)  # a row begins with its first token
        tokens_BU = (np.take_along_axis(token_BU, last_BU, 1) + place_U - last_BU) % self.vocab_size
        return label_next(tokens_BU)

    def parse(self, text: str) -> list[int]:
        """Return the tokens of a text of numbers separated by spaces."""
        return parse_numbers(text, self.vocab_size)
