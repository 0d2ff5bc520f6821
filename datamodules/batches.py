"""Batches that any rank, any worker and any resumed run can name by number.

A batch is a function of (epoch, number) and of nothing else. Ranks therefore share a global batch without
communication, workers need no state, and a run that resumes within an epoch continues with the next batch.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import pairwise
from random import Random
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

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
BatchT = TypeVar("BatchT")


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
        drop_last: Leave out, in each epoch, the samples that do not fill a batch.

    Attributes:
        smallest: Size of the smallest batch.
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


class _RankShare(Dataset[SamplesT]):
    """One rank's part of each global batch: every world-th sample, so that all ranks get similar lengths."""

    def __init__(self, batches: Batches[SamplesT], rank: int, world: int):
        self.batches, self.rank, self.world = batches, rank, world

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, key: tuple[int, int]) -> SamplesT:
        share: SamplesT = self.batches.batch(*key)[self.rank :: self.world]
        return share


class _BatchNumbers(DistributedSampler[tuple[int, int]], SequentialSampler):
    """The (epoch, number) of each batch of an epoch, from `start` on.

    It is a `DistributedSampler` because Lightning replaces any other sampler when there are several ranks, and because
    Lightning calls `set_epoch` of samplers of this class. It is a `SequentialSampler` because Lightning replaces any
    other one under `trainer.overfit_batches`; `FirstBatches` then repeats the batches.
    """

    def __init__(self, share: _RankShare[Any]):
        super().__init__(share, num_replicas=1, rank=0, shuffle=False)
        self.share, self.start = share, 0

    def __iter__(self) -> Iterator[tuple[int, int]]:  # type: ignore[override]  # a SequentialSampler gives one number
        # A generator, so that `start` is reset at the first `next`: a DataLoader with workers makes two iterators
        start, self.start = self.start, 0
        epoch = self.epoch
        for number in range(start, len(self.share)):
            yield epoch, number

    def __len__(self) -> int:
        return len(self.share)


class BatchLoader(DataLoader[Any], Generic[BatchT]):
    """A DataLoader over numbered batches; its state can be saved and loaded within an epoch.

    Args:
        batches: The global batches.
        collate: Makes a batch of tensors from a rank's samples.
        rank: Index of this process.
        world: Number of processes.
        **options: Options of DataLoader, such as `num_workers`.
    """

    def __init__(
        self,
        batches: Batches[SamplesT],
        collate: Callable[[SamplesT], BatchT],
        rank: int = 0,
        world: int = 1,
        **options: Any,
    ):
        share = _RankShare(batches, rank, world)
        numbers = _BatchNumbers(share)
        collate_fn: Callable[[Any], BatchT] = collate  # DataLoader's annotation expects a list of samples
        super().__init__(
            share,
            batch_size=None,
            sampler=numbers,
            collate_fn=collate_fn,
            worker_init_fn=leave_signals_to_the_run,
            generator=torch.Generator(),  # an iterator takes no random number from the training, also after a resume
            **options,
        )
        self.numbers, self.done = numbers, 0

    def __iter__(self) -> Iterator[BatchT]:  # type: ignore[override]  # torch's annotation is a private class
        """Iterate over the rest of the epoch and count the batches."""
        self.done = self.numbers.start
        for batch in super().__iter__():
            self.done += 1
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Return how many batches of the epoch have been yielded."""
        return {"done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Make the next iteration start after the batches that `state` counts."""
        self.numbers.start = state["done"] % len(self)


def leave_signals_to_the_run(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a worker, so that the run can end its step; the worker ends with the run."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)


class UnchangedLoader(Generic[BatchT]):
    """Wraps a loader for `predict`, where Lightning would rebuild a DataLoader in order to track sample indices.

    Args:
        loader: The loader.
    """

    def __init__(self, loader: BatchLoader[BatchT]):
        self.loader = loader

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[BatchT]:
        return iter(self.loader)
