"""Word problems of finite groups: what is the product of all elements so far?

Shapes: G elements of the group, B rows, T positions.
"""

import re
from itertools import permutations
from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.batch import IGNORE, Integers, TokenBatch
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

    Training and validation rows have `train_len` elements, test rows `test_len`. `seq_len` is the longer row.

    A delta rule changes its state by one reflection per token and block, and a product of two swaps needs two. With
    `tokens_per_element` n, element x of G is written as n tokens x, x + G, ..., x + (n - 1) G, and the last one has the
    label, so each token can reflect another way: n reflections per element, as in DeltaProduct (Siems et al. 2025,
    arXiv:2502.10297).

    Args:
        group: S3, S4 or S5 (all permutations), A3 to A6 (even ones), Z2 to Z1024 (cyclic).
        train_len: Elements of training and validation rows.
        test_len: Elements of test rows.
        tokens_per_element: Tokens of an element, n; the model's `vocab_size` is n times the group's size.
        **common: Arguments of `SequenceTask`.

    Attributes:
        groups: Names of the groups of elements: `position_to_32` has the elements 17 to 32, counted from 1.
    """

    ceiling = 1.0

    def __init__(
        self, group: str = "S3", train_len: int = 32, test_len: int = 512, tokens_per_element: int = 1, **common: Any
    ):
        super().__init__(**common)
        check_numbers("data", 1, SIZE, test_len=test_len, tokens_per_element=tokens_per_element)
        self.test_len, self.tokens_per_element = test_len, tokens_per_element
        self.tune(group, train_len)

    def tune(self, group: str, train_len: int) -> None:
        """Set the knobs; see the class.

        Raises:
            UserError: There is no such group, or the length is not positive.
        """
        check_numbers("data", 1, SIZE, train_len=train_len)
        longest = max(train_len, self.test_len)
        self.group, self.train_len, self.seq_len = group, train_len, longest * self.tokens_per_element
        self._table_GG = product_table(group)
        self._size = len(self._table_GG)
        self.vocab_size = self._size * self.tokens_per_element
        self.chance = 1 / self._size
        self._edges = octaves(longest)
        self.groups = [f"position_to_{edge}" for edge in self._edges]

    def randomness(self, rng: np.random.Generator, count: int) -> tuple[Integers, ...]:
        """Draw elements for rows of `train_len`."""
        return (rng.integers(self._size, size=(count, self.train_len)),)

    def fixed(self, split: Split, count: int) -> Integers:
        """Return `count` rows_B2T of a held-out split; those of the test set have `test_len` positions."""
        if split == "validation":
            return super().fixed(split, count)
        return self.rows(held_out_stream(split).integers(self._size, size=(count, self.test_len)))

    def rows(self, *drawn: Integers) -> Integers:
        """Return the tokens of elements, and the products at the last token of each, rows_B2T."""
        (element_BE,) = drawn
        rows_2BEn = np.full((2, *element_BE.shape, self.tokens_per_element), IGNORE, np.int64)
        rows_2BEn[0] = element_BE[..., None] + self._size * np.arange(self.tokens_per_element)
        rows_2BEn[1, ..., -1] = self._products(element_BE)
        return rows_2BEn.reshape(2, len(element_BE), -1).swapaxes(0, 1)

    def _products(self, element_BT: Integers) -> Integers:
        # After k rounds a position has the product of the last 2^k elements up to it
        product_BT, step = element_BT.copy(), 1
        while step < product_BT.shape[1]:
            product_BT[:, step:] = self._table_GG[product_BT[:, :-step], product_BT[:, step:]]
            step *= 2
        return product_BT

    def parse(self, text: str) -> list[int]:
        """Return the tokens of a text of elements, numbers separated by spaces."""
        elements = np.array([parse_numbers(text, self._size)])
        tokens: list[int] = self.rows(elements)[0, 0].tolist()
        return tokens

    def input_labels(self, tokens: list[int]) -> list[int]:
        """Return the product at the last token of each element."""
        labels: list[int] = self.rows(np.array([tokens[:: self.tokens_per_element]]))[0, 1].tolist()
        return labels

    def group_of(self, batch: TokenBatch) -> Tensor:
        """Return the index in `groups` of each position, int64 [B, T]."""
        tokens_BT = batch["tokens"]
        element_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device) // self.tokens_per_element + 1
        return octave_of(element_T, self._edges).expand_as(tokens_BT)
