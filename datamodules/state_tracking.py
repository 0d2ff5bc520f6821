"""Word problems of finite groups: what is the product of all elements so far?

Shapes: G elements of the group, B rows, T positions.
"""

import re
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.batch import Integers, TokenBatch
from datamodules.errors import SIZE, UserError, check_numbers
from datamodules.sequence_task import Split, held_out_stream
from datamodules.token_rows import octave_of, octaves, parse_numbers
from datamodules.tunable_task import TunableTask

LARGEST = {"S": 5, "A": 6, "Z": 1024}  # n of the symmetric, alternating and cyclic groups


def product_table(group: str) -> Integers:
    """Return the product of each two elements of a group, table_GG.

    Elements of S<n> and A<n> are permutations in lexicographic order, and the product a b applies a first: (a b)(i) =
    b(a(i)). Elements of Z<n> are numbers, which are added modulo n. Element 0 is the identity.

    Args:
        group: S3 to S5, A3 to A6, or Z2 to Z1024.

    Raises:
        UserError: There is no such group here.
    """
    found = re.fullmatch(r"([SAZ])(\d{1,4})", group)
    family, n = (found[1], int(found[2])) if found else ("Z", 0)
    if not (2 if family == "Z" else 3) <= n <= LARGEST[family]:
        raise UserError(f"data.group '{group}' must be S3, S4, S5, A3 to A6, or Z2 to Z1024")
    if family == "Z":
        return np.add.outer(np.arange(n), np.arange(n)) % n
    element_Gn = np.array([p for p in permutations(range(n)) if family == "S" or _is_even(p)])
    code_G = element_Gn @ n ** np.arange(n)[::-1]  # increases in lexicographic order
    product_GGn = element_Gn[:, element_Gn].swapaxes(0, 1)  # [b, a, i] -> [a, b, i]
    return np.searchsorted(code_G, product_GGn @ n ** np.arange(n)[::-1])


def _is_even(permutation: tuple[int, ...]) -> bool:
    pairs = ((i, j) for j in range(len(permutation)) for i in range(j))
    return sum(permutation[i] > permutation[j] for i, j in pairs) % 2 == 0


class StateTracking(TunableTask):
    """Tokens are random elements of a group; the label at each position is the product of the elements so far.

    The label at position t is x_1 x_2 ... x_t, as in Liu et al. 2023 (arXiv:2210.10749). A row of `Z5` with
    `train_len` 6::

        tokens  3  4  0  2  1  4
        labels  3  2  2  4  0  4

    S5 and A5 are not solvable: their word problem is complete for NC1 (Barrington 1989), beyond a network of constant
    depth without a recurrent state. S3, S4 and cyclic groups are solvable.

    Training and validation rows have `train_len` positions, test rows `test_len`. `seq_len` is the larger one.

    Args:
        group: S3, S4 or S5 (all permutations), A3 to A6 (even ones), Z2 to Z1024 (cyclic).
        train_len: Positions of training and validation rows.
        test_len: Positions of test rows.
        **common: Arguments of `SequenceTask`.

    Attributes:
        groups: Names of the groups of positions: `position_to_32` has the positions 17 to 32, counted from 1.
    """

    ceiling = 1.0

    def __init__(self, group: str = "S3", train_len: int = 32, test_len: int = 512, **common: Any):
        super().__init__(**common)
        check_numbers("data", 1, SIZE, test_len=test_len)
        self.test_len = test_len
        self.tune(group, train_len)

    def tune(self, group: str, train_len: int) -> None:
        """Set the knobs; see the class.

        Raises:
            UserError: There is no such group, or the length is not positive.
        """
        check_numbers("data", 1, SIZE, train_len=train_len)
        self.group, self.train_len, self.seq_len = group, train_len, max(train_len, self.test_len)
        self._table_GG = product_table(group)
        self.vocab_size = len(self._table_GG)
        self.chance = 1 / self.vocab_size
        self._edges = octaves(self.seq_len)
        self.groups = [f"position_to_{edge}" for edge in self._edges]

    def randomness(self, rng: np.random.Generator, count: int) -> tuple[Integers, ...]:
        """Draw elements for rows of `train_len`."""
        return (rng.integers(self.vocab_size, size=(count, self.train_len)),)

    def fixed(self, split: Split, count: int) -> Integers:
        """Return `count` rows_B2T of a held-out split; those of the test set have `test_len` positions."""
        if split == "validation":
            return super().fixed(split, count)
        return self.rows(held_out_stream(split).integers(self.vocab_size, size=(count, self.test_len)))

    def rows(self, *drawn: Integers) -> Integers:
        """Return elements and products, rows_B2T."""
        rows_2BT = np.stack([drawn[0], self._products(drawn[0])])
        return rows_2BT.swapaxes(0, 1)

    def _products(self, element_BT: Integers) -> Integers:
        # After k rounds a position has the product of the last 2^k elements up to it
        product_BT, step = element_BT.copy(), 1
        while step < product_BT.shape[1]:
            product_BT[:, step:] = self._table_GG[product_BT[:, :-step], product_BT[:, step:]]
            step *= 2
        return product_BT

    def parse(self, text: str) -> list[int]:
        """Return the tokens of a text of numbers separated by spaces."""
        return parse_numbers(text, self.vocab_size)

    def input_labels(self, tokens: list[int]) -> list[int]:
        """Return the product at each position."""
        products: list[int] = self._products(np.array([tokens]))[0].tolist()
        return products

    def group_of(self, batch: TokenBatch) -> Tensor:
        """Return the index in `groups` of each position, int64 [B, T]."""
        tokens_BT = batch["tokens"]
        position_T = torch.arange(1, tokens_BT.shape[1] + 1, device=tokens_BT.device)
        return octave_of(position_T, self._edges).expand_as(tokens_BT)
