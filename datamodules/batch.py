"""The batch of token sequences, the Protocols for modules, and the base class of all datamodules.

Shapes: S ensemble members, B rows, T positions.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NotRequired, Protocol, TypedDict, cast, runtime_checkable

import numpy as np
import numpy.typing as npt
from lightning import LightningDataModule
from torch import Tensor

from datamodules.batches import LANES, Batches, FirstBatches, SamplesT
from datamodules.errors import SIZE, UserError, check_numbers
from datamodules.loader import BatchLoader, BatchT

IGNORE = -100  # the label of a position without a target; the loss and all measures leave it out

Integers = npt.NDArray[np.integer[Any]]


class TokenBatch(TypedDict):
    """Rows of tokens with their labels, int64 [B, T], or [S, B, T] where each ensemble member has separate rows.

    Attributes:
        tokens: The tokens.
        labels: The target of the logits at each position: `labels[t]` belongs to `logits[t]`. `IGNORE` where there is
            no target.
        lengths: Tokens of each input of `predict`, [B]; zeros follow in the shorter rows.
    """

    tokens: Tensor
    labels: Tensor
    lengths: NotRequired[Tensor]


@runtime_checkable
class HasEnsemble(Protocol):
    """A module that trains S seeds as one program; S is 1 for an ordinary module."""

    ensemble: int


@runtime_checkable
class HasWidth(Protocol):
    """A module with a residual stream of `width` features."""

    width: int


@runtime_checkable
class SupportsCollate(Protocol):
    """A module that makes batches from problems in words."""

    def collate(self, problems: Sequence[Any], training: bool) -> Mapping[str, Any]:
        """Return a batch."""
        ...


@runtime_checkable
class SupportsLengths(Protocol):
    """A module that knows before it makes a batch how long its rows are."""

    def lengths(self, problems: Sequence[Any]) -> list[int]:
        """Return the tokens of each problem's longest row in training."""
        ...


class _Limited(Protocol):
    """What Lightning's trainer has without declaring it."""

    overfit_batches: int | float
    limit_train_batches: int | float


class TaskDataModule(LightningDataModule, ABC):
    """Base of the datamodules: it checks their sizes and makes loaders of this rank's part of each global batch.

    Args:
        batch_size: Samples per device and step.
        eval_batch_size: Samples per device and step in validation, test and predict.
        num_workers: Processes that prepare training batches.
        epoch_size: Samples per epoch.
        sizes: More sizes to check, by their key under `data`.

    Raises:
        UserError: A size is below 1 or above `SIZE`, an epoch is smaller than a batch, or `num_workers` does not divide
            `LANES`.
    """

    def __init__(
        self, batch_size: int, eval_batch_size: int, num_workers: int, epoch_size: int, sizes: Mapping[str, int]
    ):
        super().__init__()
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size, **sizes}
        check_numbers("data", 1, SIZE, **sizes)
        check_numbers("data", 1, epoch_size=epoch_size)
        if num_workers not in (0, *(n for n in range(1, LANES + 1) if LANES % n == 0)):
            raise UserError(f"data.num_workers must be 0, 1, 2, 4 or 8, not {num_workers}")
        if epoch_size < batch_size:
            raise UserError(f"data.epoch_size ({epoch_size}) is smaller than data.batch_size ({batch_size})")
        self.batch_size, self.eval_batch_size = batch_size, eval_batch_size
        self.num_workers, self.epoch_size = num_workers, epoch_size

    @abstractmethod
    def train_dataloader(self) -> BatchLoader[Any]:
        """Return the training batches, the same global batches for any number of ranks."""

    @property
    def _rank(self) -> int:
        return self.trainer.global_rank if self.trainer else 0

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _module(self) -> object:
        # An `object`, since nn.Module declares every attribute name, as a tensor or module: no Protocol would match
        return self.trainer.lightning_module if self.trainer else None

    def _check_epoch(self, size: int) -> None:
        """Raise UserError if an epoch is smaller than a global batch of `size` samples."""
        if self.epoch_size < size:
            raise UserError(f"data.epoch_size ({self.epoch_size}) is smaller than a batch of all devices ({size})")

    def _check_shares(self, samples: str, batches: int, smallest: int) -> None:
        """Raise UserError if the smallest of a set's batches has fewer samples than there are devices."""
        if smallest < self._world:
            raise UserError(
                f"data: {samples} in {batches} batches leave some of {self._world} devices without any: use a larger "
                "set, larger batches or fewer devices"
            )

    def _overfit(self, batches: Batches[SamplesT]) -> Batches[SamplesT]:
        """Return the batches of training or validation, under `trainer.overfit_batches` the first ones repeated."""
        share = cast(_Limited, self.trainer).overfit_batches if self.trainer else 0
        return FirstBatches(batches, share) if share else batches

    def _train_loader(self, batches: Batches[SamplesT], collate: Callable[[SamplesT], BatchT]) -> BatchLoader[BatchT]:
        """Return the loader of the training batches, which knows how many the trainer takes per epoch."""
        loader = self._loader(self._overfit(batches), collate, self.num_workers)
        if self.trainer:
            limit = cast(_Limited, self.trainer).limit_train_batches
            loader.batches_per_epoch = min(len(loader), limit if isinstance(limit, int) else int(limit * len(loader)))
        return loader

    def _loader(
        self, batches: Batches[SamplesT], collate: Callable[[SamplesT], BatchT], workers: int = 0
    ) -> BatchLoader[BatchT]:
        """Return a loader of this rank's part of each batch."""
        strategy = getattr(self.trainer, "strategy", None)
        on_gpu = strategy is not None and strategy.root_device.type == "cuda"
        options: dict[str, Any] = {"pin_memory": on_gpu}  # else moving a batch waits for the GPU to end its work
        if workers:
            # Forked: workers share tables without a copy, and neither a tokenizer nor a trainer has to be picklable
            options |= {"num_workers": workers, "prefetch_factor": 4, "multiprocessing_context": "fork"}
            options["persistent_workers"] = True
        return BatchLoader(batches, collate, self._rank, self._world, **options)
