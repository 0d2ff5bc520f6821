"""Loaders of numbered batches, of which each rank takes its share."""

import signal
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from datamodules.batches import Batches, SamplesT

BatchT = TypeVar("BatchT")
SMALL = 2**16  # bytes of a tensor that a worker sends by value


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

    Attributes:
        batches_per_epoch: Batches of an epoch that are taken; all of them, unless a trainer takes fewer.
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
            worker_init_fn=start_worker,
            generator=torch.Generator(),  # an iterator takes no random number from the training, also after a resume
            **options,
        )
        self.numbers, self.done, self.batches_per_epoch = numbers, 0, len(share)

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
        self.numbers.start = state["done"] % self.batches_per_epoch


def start_worker(worker: int) -> None:
    """Ignore Ctrl-C and SIGTERM in a worker, so that the run can end its step, and send its small tensors by value.

    The worker ends with the run. Torch sends each tensor through shared memory, whose file the run gets over a new
    connection to the worker. For a small tensor that takes longer than its numbers do.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    ForkingPickler.register(Tensor, _reduced)


def _reduced(x: Tensor) -> tuple[Any, ...]:
    """Return how a tensor is pickled in a worker."""
    if x.nbytes > SMALL or x.dtype == torch.bfloat16:  # numpy has no bfloat16
        return tuple(reduce_tensor(x))  # type: ignore[no-untyped-call]  # torch has no types here
    return _tensor, (x.numpy(),)


def _tensor(array: npt.NDArray[np.generic]) -> Tensor:
    return torch.from_numpy(array)


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
