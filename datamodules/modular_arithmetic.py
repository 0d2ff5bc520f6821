"""Arithmetic modulo p, trained on a part of all pairs of numbers: the task of the grokking experiments.

Shapes: B rows, P pairs of numbers, S ensemble members, T = 3 positions.
"""

import re
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn

from datamodules.batch import IGNORE, Integers
from datamodules.batches import Batches
from datamodules.errors import SEEDS, UserError, check_numbers
from datamodules.sequence_task import TASK, TRAINING, SequenceTask, Split, by_member, stream
from datamodules.token_rows import number_below

LARGEST = 4096  # of p: there are p^2 pairs in memory
EPOCH = 1000  # approximate steps per epoch, so that the work between epochs takes a negligible part of the time
SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "div": "/", "square_sum": "+"}


def is_prime(number: int) -> bool:
    """Return whether a number is prime."""
    return number > 1 and all(number % divisor for divisor in range(2, int(number**0.5) + 1))


class _SameBatch:
    """The same batch in every step."""

    def __init__(self, rows_P2T: Integers):
        self.rows_P2T = rows_P2T

    def __len__(self) -> int:
        return EPOCH

    def batch(self, epoch: int, number: int) -> Integers:
        return self.rows_P2T


class _ShuffledBatches:
    """Passes over the rows, each in a new random order; a pass leaves out the rows that do not fill a batch."""

    def __init__(self, rows_P2T: Integers, seed: int, members: int, size: int):
        self.rows_P2T, self.seed, self.members, self.size = rows_P2T, seed, members, size
        self.per_pass = len(rows_P2T) // size
        self._orders_SP = lru_cache(maxsize=1)(self._make_orders)

    def __len__(self) -> int:
        return max(EPOCH // self.per_pass, 1) * self.per_pass

    def _make_orders(self, number: int) -> Integers:
        seeds = range(self.seed, self.seed + self.members)
        return np.stack([stream(seed, TRAINING, number).permutation(len(self.rows_P2T)) for seed in seeds])

    def batch(self, epoch: int, number: int) -> Integers:
        number_of_pass, within = divmod(epoch * len(self) + number, self.per_pass)
        chosen_SB = self._orders_SP(number_of_pass)[:, within * self.size : (within + 1) * self.size]
        return by_member(self.rows_P2T[chosen_SB.ravel()], self.members)


class ModularArithmetic(SequenceTask):
    """Rows `[a, b, =]` with one label, a op b modulo p, at the last position (Power et al. 2022, arXiv:2201.02177).

    The tokens are the numbers below p, and `=` is token p. A row with p = 113 and op `add`, where `-` is IGNORE::

        text     60  70    =
        tokens   60  70  113
        labels    -   -   17

    A permutation of all pairs, drawn with `task_seed`, is split: the first `train_fraction` of the pairs train, the
    others are held out. Mini-batches are passes over the training pairs, each in a new order; a pass leaves out the
    pairs that do not fill a batch. In full batch all ensemble members share one batch [B, T], whose tensors are the
    same memory in every step. An epoch is about 1000 steps, whatever the number of passes.

    Args:
        p: The modulus.
        op: `add` a + b, `sub` a - b, `mul` a b, `div` a / b (b is not 0, p is prime), `square_sum` a^2 + b^2.
        train_fraction: Proportion of the pairs that train.
        task_seed: Seed of the split, independent of `seed`.
        batch_size: Pairs per device and step (and ensemble member); None for all training pairs in every step, shared
            by all devices.
        eval_batch_size: Pairs per device and step in validation, test and predict.
        validation_size: Number of held-out pairs in the validation set; None for all. The test set is all of them.
        **common: Arguments of `SequenceTask`.
    """

    def __init__(
        self,
        p: int = 113,
        op: Literal["add", "sub", "mul", "div", "square_sum"] = "add",
        train_fraction: float = 0.3,
        task_seed: int = 0,
        batch_size: int | None = None,
        eval_batch_size: int = 8192,
        validation_size: int | None = None,
        **common: Any,
    ):
        check_numbers("data", 2, LARGEST, p=p)
        check_numbers("data", 0, 1, train_fraction=train_fraction)
        check_numbers("data", 0, SEEDS, task_seed=task_seed)
        if op == "div" and not is_prime(p):
            raise UserError(f"data.p must be prime for data.op 'div', and {p} is not: some numbers have no inverse")
        self.p, self.op, self.seq_len, self.vocab_size = p, op, 3, p + 1
        a_P, b_P = np.divmod(np.arange(p * p), p)
        pairs_P2 = np.stack([a_P, b_P], axis=1)[b_P > 0 if op == "div" else slice(None)]
        pairs_P2 = stream(task_seed, TASK).permutation(pairs_P2)
        # The proportion of the most frequent answer; above 1 / p where answers are not equally frequent, as in products
        self.chance, self.ceiling = np.bincount(self.answer(*pairs_P2.T)).max().item() / len(pairs_P2), 1.0
        train = round(train_fraction * len(pairs_P2))
        if not 0 < train < len(pairs_P2):
            raise UserError(
                f"data.train_fraction {train_fraction} leaves no pair for training or none held out, of {len(pairs_P2)}"
            )
        self.train_rows_P2T, self.held_out_rows_P2T = self._rows(pairs_P2[:train]), self._rows(pairs_P2[train:])
        held_out = len(pairs_P2) - train
        if validation_size is not None and validation_size > held_out:
            raise UserError(f"data.validation_size ({validation_size}) is more than the {held_out} held-out pairs")
        if batch_size is not None and batch_size > train:
            raise UserError(f"data.batch_size ({batch_size}) is more than the {train} training pairs")
        self.full_batch = batch_size is None
        super().__init__(
            batch_size=train if batch_size is None else batch_size,
            eval_batch_size=eval_batch_size,
            epoch_size=train,
            validation_size=held_out if validation_size is None else validation_size,
            test_size=held_out,
            **common,
        )
        if self.full_batch and self.num_workers:
            rank_zero_warn("data.num_workers is ignored in full batch: the batch is the same in every step")
            self.num_workers = 0

    def answer(self, a: Integers, b: Integers) -> Integers:
        """Return a op b modulo p."""
        value: Integers
        match self.op:
            case "add":
                value = a + b
            case "sub":
                value = a - b
            case "mul":
                value = a * b
            case "div":
                value = a * np.array([0, *(pow(number, -1, self.p) for number in range(1, self.p))])[b]
            case "square_sum":
                value = a * a + b * b
        return value % self.p

    def _rows(self, pairs_P2: Integers) -> Integers:
        rows_2PT = np.full((2, len(pairs_P2), 3), IGNORE)
        rows_2PT[0, :, :2], rows_2PT[0, :, 2] = pairs_P2, self.p
        rows_2PT[1, :, 2] = self.answer(*pairs_P2.T)
        return rows_2PT.swapaxes(0, 1)

    def randomness(self, rng: np.random.Generator, count: int) -> tuple[Integers, ...]:
        """Draw training pairs, with replacement."""
        return (rng.integers(len(self.train_rows_P2T), size=count),)

    def rows(self, *drawn: Integers) -> Integers:
        """Return the rows of the drawn training pairs, rows_B2T."""
        return self.train_rows_P2T[drawn[0]]

    def fixed(self, split: Split, count: int) -> Integers:
        """Return the rows of the first `count` held-out pairs, rows_B2T."""
        return self.held_out_rows_P2T[:count]

    def train_batches(self, members: int, size: int) -> Batches[Integers]:
        """Return the global training batches, of `size` pairs per ensemble member."""
        if self.full_batch:
            return _SameBatch(self.train_rows_P2T)
        if size > len(self.train_rows_P2T):
            pairs = len(self.train_rows_P2T)
            raise UserError(f"data.batch_size: a batch of all devices ({size}) is more than the {pairs} training pairs")
        return _ShuffledBatches(self.train_rows_P2T, self.seed, members, size)

    def parse(self, text: str) -> list[int]:
        """Return the tokens of two numbers that the operation's sign or a space separates, such as `3 + 5`."""
        sign = SYMBOLS[self.op]
        if not (found := re.fullmatch(rf"\s*(\d+)(?:\s*{re.escape(sign)}\s*|\s+)(\d+)\s*=?\s*", text)):
            raise UserError(f"'{text}' is not of the form '3 {sign} 5'")
        a, b = (number_below(self.p, word) for word in found.groups())
        if a is None or b is None:
            raise UserError(f"'{text}' has a number that is not below data.p ({self.p})")
        if self.op == "div" and b == 0:
            raise UserError(f"'{text}' divides by zero")
        return [a, b, self.p]

    def input_labels(self, tokens: list[int]) -> list[int]:
        """Return IGNORE at the first two positions and the answer at the last."""
        labels: list[int] = self._rows(np.array([tokens[:2]]))[0, 1].tolist()
        return labels

    def token_text(self, token: int) -> str:
        """Return a number, or `=`."""
        return "=" if token == self.p else str(token)
