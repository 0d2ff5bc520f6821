"""Length-bucketed batches that any rank, worker or resumed run can name by number.

A batch is a function of (epoch, number), not of who asked before. Hence ranks share a global batch without talking,
workers need no state, and a run resumed in mid-epoch goes on with the very next batch.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from random import Random
from typing import Any, Generic, Protocol, TypeVar

from torch.utils.data import DataLoader, Dataset, DistributedSampler

T = TypeVar("T")

POOL = 16  # batches that are sorted by length together: padding falls to a few percent, order stays random
LANES = 8  # pools open at a time, so that up to 8 workers each make pools of their own


class Batches(Protocol[T]):
    """Something that names its batches by (epoch, number)."""

    def __len__(self) -> int:
        """Batches in an epoch."""
        ...

    def batch(self, epoch: int, number: int) -> list[T]:
        """Return one global batch."""
        ...


def _cut(samples: Sequence[T], count: int) -> list[list[T]]:
    """Cut samples into `count` runs of even size."""
    bounds = [i * len(samples) // count for i in range(count + 1)]
    return [list(samples[start:end]) for start, end in pairwise(bounds)]


def _bucket(samples: Sequence[T], count: int, length: Callable[[T], int], rng: Random) -> list[list[T]]:
    """Cut samples into `count` batches of like length, in random order."""
    batches = _cut(sorted(samples, key=length), count)
    rng.shuffle(batches)
    return batches


class FiniteBatches(Generic[T]):
    """A fixed list of samples: every one once an epoch, in an order of the epoch's own.

    Without `drop_last`, batches are of even size instead of the last one being small: each then has a share for every
    rank, unless there are more ranks than `smallest`.

    Args:
        samples: The samples.
        size: Largest global batch, over all ranks.
        length: What to bucket by.
        seed: Order of the samples.
        drop_last: Leave out, each epoch, the samples that do not fill a batch.
    """

    def __init__(self, samples: Sequence[T], size: int, length: Callable[[T], int], seed: int, drop_last: bool):
        self.samples, self.length, self.seed = samples, length, seed
        full, rest = divmod(len(samples), size)
        dropped = rest if drop_last and full else 0
        self.used = len(samples) - dropped
        self.batches = -(-self.used // size)
        self.smallest = self.used // max(self.batches, 1)
        self._epoch = lru_cache(maxsize=1)(self._make_epoch)

    def __len__(self) -> int:
        """Batches in an epoch."""
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
        """Return one global batch."""
        return self._epoch(epoch)[number]


class StreamBatches(Generic[T]):
    """Samples made on the fly, never the same one twice.

    Batch numbers deal round-robin over `LANES` pools, so that `n` workers (a divisor of `LANES`), who take every n-th
    batch, share no pool. Where an epoch ends within a block of lanes, workers change lanes and make up to `LANES` pools
    again; that costs time, never a sample.

    Args:
        make: Makes sample number i.
        samples: Samples in an epoch.
        size: Global batch size, over all ranks.
        length: What to bucket by.
    """

    def __init__(self, make: Callable[[int], T], samples: int, size: int, length: Callable[[T], int]):
        self.make, self.size, self.length = make, size, length
        self.batches = samples // size
        self._pool = lru_cache(maxsize=LANES)(self._make_pool)

    def __len__(self) -> int:
        """Batches in an epoch."""
        return self.batches

    def _make_pool(self, pool: int) -> list[list[T]]:
        step = POOL * self.size
        samples = [self.make(i) for i in range(pool * step, (pool + 1) * step)]
        return _bucket(samples, POOL, self.length, Random(pool))

    def batch(self, epoch: int, number: int) -> list[T]:
        """Return one global batch."""
        block, within = divmod(epoch * self.batches + number, LANES * POOL)
        slot, lane = divmod(within, LANES)
        return self._pool(block * LANES + lane)[slot]


class _RankShare(Dataset):
    """This rank's share of each global batch: every world-th sample, so that lengths are even over ranks."""

    def __init__(self, batches: Batches, rank: int, world: int):
        self.batches, self.rank, self.world = batches, rank, world

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, key: tuple[int, int]) -> list:
        return self.batches.batch(*key)[self.rank :: self.world]


class _Numbers(DistributedSampler):
    """Batch numbers of an epoch, from where a resumed run left off.

    A `DistributedSampler` by type, for that is how Lightning is told that ranks are taken care of.
    """

    def __init__(self, dataset: _RankShare):
        super().__init__(dataset, num_replicas=1, rank=0, shuffle=False)
        self.start = 0

    def __iter__(self) -> Iterator[tuple[int, int]]:
        # A generator, so that the start is used up when read: a DataLoader with workers asks for two iterators
        start, self.start = self.start, 0
        epoch = self.epoch
        for number in range(start, len(self.dataset)):
            yield epoch, number

    def __len__(self) -> int:
        return len(self.dataset)


class BatchLoader(DataLoader):
    """A DataLoader over numbered batches that can be saved and resumed in mid-epoch.

    Args:
        batches: The global batches.
        collate: Makes a rank's list of samples a batch of tensors.
        rank: This process.
        world: How many processes.
        **options: `num_workers` and the like, as in DataLoader.
    """

    def __init__(self, batches: Batches, collate: Callable[[list], Any], rank: int = 0, world: int = 1, **options: Any):
        share = _RankShare(batches, rank, world)
        super().__init__(share, batch_size=None, sampler=_Numbers(share), collate_fn=collate, **options)
        self.done = 0

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the rest of the epoch, counting what was handed out."""
        self.done = self.sampler.start
        for batch in super().__iter__():
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """How many batches of the epoch were handed out."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on after them at the next iteration."""
        self.sampler.start = state["done"] % len(self)


class AsGiven:
    """A loader that Lightning takes as it is; for predict it would build a DataLoader anew, to keep samples' indices.

    Args:
        loader: The loader.
    """

    def __init__(self, loader: BatchLoader):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.loader)
