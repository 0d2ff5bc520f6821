"""Multi-query associative recall in the setting of Zoology.

Shapes: B rows, T positions, P pairs of a row, S ensemble members.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from datamodules.batch import Integers, TokenBatch
from datamodules.batches import Batches
from datamodules.errors import POSITIVE, SIZE, UserError, check_numbers
from datamodules.loader import BatchLoader
from datamodules.sequence_task import (
    TRAINING,
    SequenceTask,
    Split,
    by_member,
    collate,
    held_out_stream,
    stream,
)
from datamodules.token_rows import distinct, pair_rows, parse_numbers, recalled

Drawn = tuple[Integers, ...]  # keys, values and gaps of rows, each [B, P], and their length, [B, 1]

TRAIN_SETS = [[64, 4, 100_000], [128, 8, 20_000], [256, 16, 20_000], [256, 32, 20_000], [256, 64, 20_000]]
TEST_SETS = [[64, 4], [64, 8], [64, 16], [128, 32], [256, 64], [512, 128], [1024, 256]]


class _SetBatches:
    """Batches of several sets, one set after the other, each cut into batches whose sizes differ by at most 1.

    `sets` has the rows of each ensemble member for each set.
    """

    def __init__(self, task: "AssociativeRecall", sets: list[list[Drawn]], size: int):
        self.task, self.sets = task, sets
        counts = [len(members[0][0]) for members in sets]
        self.smallest = min(count // -(-count // size) for count in counts)
        self.parts = [
            (number, slice(i * count // batches, (i + 1) * count // batches))
            for number, count in enumerate(counts)
            for batches in [-(-count // size)]
            for i in range(batches)
        ]

    def __len__(self) -> int:
        return len(self.parts)

    def batch(self, epoch: int, number: int) -> Integers:
        number, part = self.parts[number % len(self)]
        members = self.sets[number]
        arrays = (np.concatenate([array[part] for array in arrays]) for arrays in zip(*members, strict=True))
        return by_member(self.task.rows(*arrays), len(members))


class AssociativeRecall(SequenceTask):
    """Pairs of a key and a value, then each key once more, with its value as label (Arora et al. 2024).

    A row with `vocab_size` 12, T 16 and 2 pairs; `-` is IGNORE::

        tokens  2  8  4  7  0  0  4  0  0  0  0  0  2  0  0  0
        labels  -  -  -  -  -  -  7  -  -  -  -  -  8  -  -  -

    Keys are the tokens 1 to V/2 - 1, values V/2 to V - 1; the other positions have token 0. A query stands an even
    number 2 (gap - 1) of positions behind the pairs; gaps are drawn one after the other without replacement, with
    probabilities proportional to gap^(power_a - 1), so most queries come early.

    The defaults are those of "Zoology" (arXiv:2312.04927) as its authors' repository has them for the comparison of
    delta networks: five training sets that are drawn once and repeated in each epoch, set after set, and seven test
    sets of 1000 rows, which differ from the training sets in length and number of pairs. Each batch has rows of one
    set. Each ensemble member has training sets of its own, about 35 MB.

    Args:
        vocab_size: V.
        power_a: Exponent of the gaps; 1 makes all gaps equally likely.
        train_sets: T, P and the number of rows of each training set.
        test_sets: T and P of each test set.
        batch_size: Rows per device and step (and ensemble member).
        validation_size: Rows per test set in validation.
        test_size: Rows per test set in the test.
        **common: Arguments of `SequenceTask`; an epoch is one pass through the training sets.

    Attributes:
        groups: Names of the test sets: `64x4` has T 64 and 4 pairs.
    """

    ceiling = 1.0

    def __init__(
        self,
        vocab_size: int = 8192,
        power_a: float = 0.01,
        train_sets: list[list[int]] | None = None,
        test_sets: list[list[int]] | None = None,
        batch_size: int = 256,
        validation_size: int = 128,
        test_size: int = 1000,
        **common: Any,
    ):
        check_numbers("data", 4, SIZE, vocab_size=vocab_size)
        check_numbers("data", POSITIVE, power_a=power_a)
        self.vocab_size, self.power_a = vocab_size, power_a
        self.keys, self.values = range(1, vocab_size // 2), range(vocab_size // 2, vocab_size)
        self.train_sets = self._sets("train_sets", TRAIN_SETS if train_sets is None else train_sets, 3)
        self.test_sets = self._sets("test_sets", TEST_SETS if test_sets is None else test_sets, 2)
        self.seq_len = max(sizes[0] for sizes in [*self.train_sets, *self.test_sets])
        self.chance = 1 / len(self.values)
        self.groups = [f"{length}x{pairs}" for length, pairs in self.test_sets]
        if twice := next((name for name in self.groups if self.groups.count(name) > 1), None):
            raise UserError(f"data.test_sets has {twice} twice, and its measures have one name: leave one out")
        rows = sum(rows for _, _, rows in self.train_sets)
        super().__init__(
            batch_size=batch_size,
            epoch_size=max(rows, batch_size),
            validation_size=validation_size,
            test_size=test_size,
            **common,
        )

    def _sets(self, name: str, sets: list[list[int]], numbers: int) -> list[list[int]]:
        names = ("length", "pairs", "rows")[:numbers]
        if not sets or any(len(sizes) != numbers for sizes in sets):
            raise UserError(f"data.{name} must be a list of [{', '.join(names)}], not {sets}")
        for number, sizes in enumerate(sets):
            check_numbers(f"data.{name}[{number}]", 1, SIZE, **dict(zip(names, sizes, strict=True)))
            length, pairs = sizes[:2]
            if length < 4 * pairs:
                raise UserError(f"data.{name}[{number}]: {pairs} pairs and their queries need a length of {4 * pairs}")
            if pairs > len(self.keys):
                raise UserError(
                    f"data.{name}[{number}]: {pairs} pairs are more than the {len(self.keys)} keys of data.vocab_size "
                    f"{self.vocab_size}"
                )
        return sets

    def _draw_set(self, rng: np.random.Generator, length: int, pairs: int, count: int) -> Drawn:
        key_BP = distinct(rng, count, len(self.keys), pairs) + self.keys.start
        value_BP = distinct(rng, count, len(self.values), pairs) + self.values.start
        gap_G = np.arange(1, (length - 2 * pairs) // 2 + 1)
        # The order of exponential waiting times is that of draws without replacement, with probabilities as the rates.
        # Their logarithms have that order too, and no power overflows
        waiting_BG = np.log(rng.standard_exponential((count, len(gap_G)))) - (self.power_a - 1) * np.log(gap_G)
        gap_BP = waiting_BG.argsort(axis=1)[:, :pairs] + 1
        return *(array.astype(np.int32) for array in (key_BP, value_BP, gap_BP)), np.full((count, 1), length)

    def _held_out_sets(self, split: Split, count: int) -> list[list[Drawn]]:
        streams = held_out_stream(split).spawn(len(self.test_sets))
        sizes = zip(streams, self.test_sets, strict=True)
        return [[self._draw_set(rng, length, pairs, count)] for rng, (length, pairs) in sizes]

    def randomness(self, rng: np.random.Generator, count: int) -> Drawn:
        """Draw keys, values, gaps and lengths for rows like those of the first test set."""
        length, pairs = self.test_sets[0]
        return self._draw_set(rng, length, pairs, count)

    def rows(self, *drawn: Integers) -> Integers:
        """Write pairs and queries, rows_B2T."""
        key_BP, value_BP, gap_BP, length_B1 = drawn
        pairs = key_BP.shape[1]
        place_BP = np.broadcast_to(np.arange(0, 2 * pairs, 2), key_BP.shape)
        return pair_rows(
            int(length_B1[0, 0]), key_BP, value_BP, place_BP, key_BP, value_BP, 2 * (pairs + gap_BP.astype(int) - 1)
        )

    def train_batches(self, members: int, size: int) -> Batches[Integers]:
        """Return the global training batches, of at most `size` rows per ensemble member."""
        sets = [
            [self._draw_set(stream(self.seed + s, TRAINING, number), length, pairs, rows) for s in range(members)]
            for number, (length, pairs, rows) in enumerate(self.train_sets)
        ]
        batches = _SetBatches(self, sets, size)
        self._check_shares("data.train_sets", len(batches), batches.smallest)
        return batches

    def val_dataloader(self) -> BatchLoader[TokenBatch]:
        """Return the validation rows of all test sets."""
        return self._sets_loader("validation", self.validation_size)

    def test_dataloader(self) -> BatchLoader[TokenBatch]:
        """Return the test sets."""
        return self._sets_loader("test", self.test_size)

    def _sets_loader(self, split: Split, count: int) -> BatchLoader[TokenBatch]:
        batches = _SetBatches(self, self._held_out_sets(split, count), self.eval_batch_size * self._world)
        self._check_shares("data.test_sets", len(batches), batches.smallest)
        return self._loader(batches, collate)

    def parse(self, text: str) -> list[int]:
        """Return the tokens of a text of numbers separated by spaces."""
        return parse_numbers(text, self.vocab_size)

    def input_labels(self, tokens: list[int]) -> list[int]:
        """Return the value last written to each key that stands there without a value behind it."""
        return recalled(tokens, self.keys, self.values)

    def group_of(self, batch: TokenBatch) -> Tensor:
        """Return the index in `groups` of the test set that the batch belongs to, int64 [B, T]."""
        labels_BT = batch["labels"]
        length, pairs = labels_BT.shape[1], int((labels_BT[0] >= 0).sum())
        return torch.full_like(labels_BT, self.groups.index(f"{length}x{pairs}"))
