"""Batches that any rank, any worker and any resumed run can name by number.

A batch is a function of (epoch, number) and of nothing else. Ranks therefore share a global batch without
communication, workers need no state, and a run that resumes within an epoch continues with the next batch.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from itertools import pairwise
from random import Random
from typing import Any, Generic, Protocol, TypeVar

POOL = 16  # batches per pool; samples are sorted by length within a pool: little padding, and the order stays random
LANES = 8  # pools that are open at a time, so that up to 8 workers each make pools of their own

T = TypeVar("T")


class Sliceable(Protocol):
    """The samples of a batch, such as a list or an array."""

    def __len__(self) -> int:
        """Return the number of samples."""
        ...

    def __getitem__(self, key: slice, /) -> Any:
        """Return some of the samples, of the same type."""
        ...


SamplesT = TypeVar("SamplesT", bound=Sliceable)
SamplesT_co = TypeVar("SamplesT_co", bound=Sliceable, covariant=True)


class Batches(Protocol[SamplesT_co]):
    """The global batches of a data set, each named by (epoch, number)."""

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        ...

    def batch(self, epoch: int, number: int) -> SamplesT_co:
        """Return the samples of one global batch."""
        ...


def _cut(samples: Sequence[T], count: int) -> list[list[T]]:
    """Cut samples into `count` lists whose sizes differ by at most 1."""
    bounds = [i * len(samples) // count for i in range(count + 1)]
    return [list(samples[start:end]) for start, end in pairwise(bounds)]


def _bucket(samples: Sequence[T], count: int, length: Callable[[T], int], rng: Random) -> list[list[T]]:
    """Cut samples into `count` batches of samples of similar length, in random order."""
    batches = _cut(sorted(samples, key=length), count)
    rng.shuffle(batches)
    return batches


class FiniteBatches(Generic[T]):
    """Batches of a fixed list of samples: each sample once per epoch, in an order that depends on the epoch.

    Without `drop_last`, all batches have the same size up to 1, and no small last batch is left over. Each batch then
    has samples for every rank, unless there are more ranks than `smallest`.

    Args:
        samples: The samples.
        size: Largest global batch, over all ranks.
        length: The length of a sample; batches hold samples of similar length.
        seed: Seed of the order.
        drop_last: Leave out, in each epoch, the samples that do not fill a batch; of fewer samples than a batch, those
            that do not fill a row of all ranks.
        world: Number of ranks.

    Attributes:
        smallest: Size of the smallest batch.
    """

    def __init__(
        self,
        samples: Sequence[T],
        size: int,
        length: Callable[[T], int],
        seed: int,
        drop_last: bool,
        world: int = 1,
    ):
        self.samples, self.length, self.seed = samples, length, seed
        full, rest = divmod(len(samples), size)
        # Objectives that compare the rows of all ranks need as many on each
        dropped = (rest if full else rest % world) if drop_last else 0
        self.used = len(samples) - dropped
        self.batches = -(-self.used // size)
        self.smallest = self.used // max(self.batches, 1)
        self._epoch = lru_cache(maxsize=1)(self._make_epoch)

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return self.batches

    def _make_epoch(self, epoch: int) -> list[list[T]]:
        rng = Random(f"{self.seed}/{epoch}")
        order = [self.samples[i] for i in rng.sample(range(len(self.samples)), self.used)]
        cuts = _cut(order, self.batches)
        pools = [cuts[start : start + POOL] for start in range(0, self.batches, POOL)]
        return [
            batch
            for pool in pools
            for batch in _bucket([sample for cut in pool for sample in cut], len(pool), self.length, rng)
        ]

    def batch(self, epoch: int, number: int) -> list[T]:
        """Return the samples of one global batch."""
        return self._epoch(epoch)[number]


class StreamBatches(Generic[T]):
    """Batches of samples that are generated when needed; no sample is used twice.

    Consecutive batches come from `LANES` different pools in turn. With n workers, where n divides `LANES`, worker w
    takes the batches w, w + n, ..., so that no two workers need the same pool. Where an epoch ends within a block of
    lanes, workers change lanes and generate up to `LANES` pools a second time, which costs time only.

    Args:
        make: Generates the sample with a given number.
        samples: Samples per epoch.
        size: Global batch size, over all ranks.
        length: The length of a sample; batches hold samples of similar length.
    """

    def __init__(self, make: Callable[[int], T], samples: int, size: int, length: Callable[[T], int]):
        self.make, self.size, self.length = make, size, length
        self.batches = samples // size
        self._pool = lru_cache(maxsize=LANES)(self._make_pool)

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return self.batches

    def _make_pool(self, pool: int) -> list[list[T]]:
        step = POOL * self.size
        samples = [self.make(i) for i in range(pool * step, (pool + 1) * step)]
        return _bucket(samples, POOL, self.length, Random(pool))

    def batch(self, epoch: int, number: int) -> list[T]:
        """Return the samples of one global batch."""
        block, within = divmod(epoch * self.batches + number, LANES * POOL)
        slot, lane = divmod(within, LANES)
        return self._pool(block * LANES + lane)[slot]


class FirstBatches(Generic[SamplesT]):
    """The first batches of epoch 0 again and again, for `trainer.overfit_batches`.

    Args:
        batches: All batches.
        share: Number of the first batches, or their fraction of all.
    """

    def __init__(self, batches: Batches[SamplesT], share: int | float):
        self.batches = batches
        self.count = max(share if isinstance(share, int) else int(share * len(batches)), 1)

    def __len__(self) -> int:
        """Return the number of all batches, of which the trainer takes its part."""
        return len(self.batches)

    def batch(self, epoch: int, number: int) -> SamplesT:
        """Return the samples of one global batch, the same ones in every epoch."""
        return self.batches.batch(0, number % self.count)
