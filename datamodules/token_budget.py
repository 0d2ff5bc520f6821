"""Batches of as many samples as fit into a number of tokens per device.

A batch of B rows is padded to its longest row, of L tokens. B x L is at most the budget on every device, and samples of
similar length go together, so that little of it is padding. Every device gets the same number of rows, since some
objectives compare the rows of all devices.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from random import Random
from typing import Generic, TypeVar

from datamodules.batch import SupportsLengths
from datamodules.batches import POOL, StreamBatches
from datamodules.errors import UserError
from datamodules.problems import Problem

MIXED = 10  # samples may change places in the order of lengths if they differ by less than a tenth
CHUNK = 64  # samples whose lengths are measured in one call

T = TypeVar("T")

Lengths = Callable[[Sequence[T]], list[int]]  # of samples, in tokens


@dataclass(frozen=True)
class Budget:
    """What a device takes in one step.

    Attributes:
        tokens: The most tokens, padding included.
        rows: The most rows.
    """

    tokens: int
    rows: int

    def cut(self, lengths: Sequence[int]) -> list[int]:
        """Cut lengths in rising order, none above `tokens`, into as few batches as possible.

        Returns:
            The bounds of the batches: 0, and the end of each batch.
        """
        bounds = [len(lengths)]
        while bounds[-1]:  # from the longest one down
            end = bounds[-1]
            bounds.append(max(end - min(self.rows, self.tokens // lengths[end - 1]), 0))
        return bounds[::-1]

    def cut_evenly(self, lengths: Sequence[int]) -> list[int]:
        """Cut lengths as `cut` does, but leave no small batch over: with the smallest budget for as many batches."""
        count, least = len(self.cut(lengths)), max(lengths, default=0)
        tokens = least + bisect_left(
            range(least, self.tokens), True, key=lambda most: len(replace(self, tokens=most).cut(lengths)) <= count
        )
        rows = 1 + bisect_left(
            range(1, self.rows), True, key=lambda most: len(Budget(tokens, most).cut(lengths)) <= count
        )
        return Budget(tokens, rows).cut(lengths)


class BudgetedBatches(Generic[T]):
    """Batches of a fixed list of samples, each sample once per epoch but for less than one per device.

    An epoch's order is that of l + u l / 10, with l the length of a sample and u a random number in [0, 1); the batches
    then come in random order. The sample at a place of the order is at most a tenth longer than the one at this place
    in the order of l, so the places at which the order is cut are the same in every epoch.

    Args:
        samples: The samples.
        lengths: Returns the lengths of samples, none of which may be above the budget.
        budget: The budget of each device.
        world: Number of devices.
        seed: Seed of the order.

    Attributes:
        smallest: The size of the smallest batch.
    """

    def __init__(self, samples: Sequence[T], lengths: Lengths[T], budget: Budget, world: int, seed: int):
        self.samples, self.world, self.seed = samples, world, seed
        self.lengths = lengths(samples)
        self.used = len(samples) // world * world
        ordered = sorted(self.lengths)[len(samples) - self.used :]
        most = [min(length + length // MIXED, ordered[-1]) for length in ordered]
        self.bounds = [world * bound for bound in budget.cut_evenly(most[world - 1 :: world])]
        self.smallest = min((end - start for start, end in pairwise(self.bounds)), default=0)
        self._epoch = lru_cache(maxsize=1)(self._make_epoch)

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return len(self.bounds) - 1

    def _make_epoch(self, epoch: int) -> list[list[T]]:
        rng, lengths = Random(f"{self.seed}/{epoch}"), self.lengths
        order = rng.sample(range(len(self.samples)), self.used)
        order.sort(key=lambda i: lengths[i] + rng.random() * (lengths[i] // MIXED))
        batches = [[self.samples[i] for i in order[start:end]] for start, end in pairwise(self.bounds)]
        rng.shuffle(batches)
        return batches

    def batch(self, epoch: int, number: int) -> list[T]:
        """Return the samples of one global batch."""
        return self._epoch(epoch)[number]


class BudgetedStream(StreamBatches[T]):
    """Batches of samples that are generated when needed; no sample is used twice.

    A pool takes as many samples as fit into its batches. Those that were generated beyond them are not used.

    Args:
        make: Generates the sample with a given number.
        samples: Samples per epoch, about: an epoch has as many batches as hold them if all pools are like the first.
        lengths: Returns the lengths of samples, none of which may be above the budget.
        budget: The budget of each device.
        world: Number of devices.

    Attributes:
        rows: The mean number of samples of a batch in the first pool, rounded up.
    """

    def __init__(self, make: Callable[[int], T], samples: int, lengths: Lengths[T], budget: Budget, world: int):
        super().__init__(make, samples, budget.rows * world, lambda sample: lengths([sample])[0])
        self.lengths, self.budget, self.world = lengths, budget, world
        first = sum(map(len, self._pool(0)))
        self.batches, self.rows = samples * POOL // first, -(-first // POOL)

    def _make_pool(self, pool: int) -> list[list[T]]:
        samples, lengths = self._draw(pool)
        world, budget = self.world, self.budget

        def ordered(rows: int) -> list[int]:
            """Return the order of the first samples, of `rows` per device, by their length."""
            return sorted(range(rows * world), key=lengths.__getitem__)

        def longest(order: list[int]) -> list[int]:
            return [lengths[i] for i in order[world - 1 :: world]]

        # The most rows that need no more batches than a pool has: bounds are one more than batches
        counts = range(len(samples) // world + 1)
        rows = bisect_right(counts, POOL + 1, key=lambda rows: len(budget.cut(longest(ordered(rows))))) - 1
        order = ordered(rows)
        bounds = budget.cut_evenly(longest(order))
        batches = [[samples[i] for i in order[world * start : world * end]] for start, end in pairwise(bounds)]
        Random(pool).shuffle(batches)
        return batches

    def _draw(self, pool: int) -> tuple[list[T], list[int]]:
        """Return samples that are too many for a pool, or the most that its rows allow, and their lengths."""
        samples: list[T] = []
        lengths: list[int] = []
        start, end = (POOL * self.size * number for number in (pool, pool + 1))
        while start < end and sum(lengths) <= POOL * self.world * self.budget.tokens:
            some = [self.make(i) for i in range(start, min(start + CHUNK, end))]
            samples, lengths, start = samples + some, lengths + self.lengths(some), start + len(some)
        return samples, lengths


def problem_lengths(module: object, most: int, problems: Sequence[Problem]) -> list[int]:
    """Return the tokens of each problem's longest row.

    Args:
        module: The module that makes rows of problems.
        most: The budget.
        problems: The problems.

    Raises:
        UserError: The module does not know the lengths, or a row is longer than the budget.
    """
    if not isinstance(module, SupportsLengths):
        raise UserError(f"data.max_tokens: {type(module).__name__} does not know the lengths of its rows, leave it out")
    lengths = module.lengths(problems)
    longest = max(lengths, default=0)
    if longest > most:
        text = problems[lengths.index(longest)].question[:40]
        raise UserError(f"data.max_tokens must be at least {longest}, not {most}: the row of {text!r}... is so long")
    return lengths
