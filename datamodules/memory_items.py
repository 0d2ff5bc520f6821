"""Items for an associative memory: contexts, from which keys are made, and values.

Shapes: S ensemble members, B rows, N items, W tokens of a context, K and V widths of keys and values.
"""

from typing import NoReturn, Protocol, TypedDict, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from datamodules.batch import HasEnsemble, Integers, TaskDataModule
from datamodules.errors import SEEDS, SIZE, UserError, check_multiples, check_numbers
from datamodules.loader import BatchLoader
from datamodules.sequence_task import HELD_OUT, stream

FAR = 2**20  # positions at which the first item of a row may stand
ALIGNMENT = 4  # of the widths of keys and values, in the kernel


@runtime_checkable
class ReadsItems(Protocol):
    """A module that writes items into a memory, and reads them after some numbers of writes."""

    read_after: list[int]


class MemoryBatch(TypedDict):
    """Rows of items, in the order in which they are written.

    Attributes:
        context_SBNWK: Features of the W tokens up to each item; the last one is the item's token. Standard normal.
        noise_SBNWK: A second draw of the same kind, with which a query's context may differ.
        kernel_SBWK: Weights of a short convolution over contexts, one for each row, uniform in +- 1 / sqrt(W).
        value_SBNV: Values, standard normal.
        first_SB: Position of the row's first item, int64.
    """

    context_SBNWK: Tensor
    noise_SBNWK: Tensor
    kernel_SBWK: Tensor
    value_SBNV: Tensor
    first_SB: Tensor


class _RowNumbers:
    """Batches of the numbers of rows, whose sizes differ by at most 1."""

    def __init__(self, rows: int, size: int):
        self.rows, self.count = rows, -(-rows // size)

    def __len__(self) -> int:
        return self.count

    def batch(self, epoch: int, number: int) -> Integers:
        start, end = (i * self.rows // self.count for i in (number, number + 1))
        return np.arange(start, end)


class MemoryItems(TaskDataModule):
    """Random items that a memory writes and then reads; there is nothing to train on, only a test set.

    Row r of ensemble member s is a function of `seed + s` and r, so that a member has the rows of an ordinary run with
    that seed. Unlike other data, test rows therefore depend on the seed: each seed is a sample of items.

    Args:
        items: N, the items of a row.
        key_width: K.
        value_width: V.
        context: W.
        test_size: Rows per seed.
        eval_batch_size: Rows per device and step.
        seed: Seed of the rows; None for the run's seed (`seed_everything`).

    Raises:
        UserError: A size is too small or too large, or a width is no multiple of 4.
    """

    def __init__(
        self,
        items: int = 64,
        key_width: int = 64,
        value_width: int = 128,
        context: int = 4,
        test_size: int = 16,
        eval_batch_size: int = 4,
        seed: int | None = None,
    ):
        sizes = {"items": items, "context": context, "test_size": test_size}
        super().__init__(1, eval_batch_size, num_workers=0, epoch_size=1, sizes=sizes)
        check_multiples("data", ALIGNMENT, SIZE, key_width=key_width, value_width=value_width)
        check_numbers("data", 0, SEEDS, seed=seed)
        self.items, self.key_width, self.value_width, self.context = items, key_width, value_width, context
        self.test_size = test_size
        self.seed = torch.initial_seed() if seed is None else seed

    def setup(self, stage: str) -> None:
        """Refuse modules that read no items.

        Raises:
            UserError: The module reads none.
        """
        if not isinstance(self._module, ReadsItems):
            name = type(self._module).__name__
            raise UserError(f"data: MemoryItems gives items of a memory, which {name} does not read: use DeltaMemory")

    def train_dataloader(self) -> NoReturn:
        """Raise UserError."""
        raise UserError("data: MemoryItems has only a test set: run `python main.py test`")

    def test_dataloader(self) -> BatchLoader[MemoryBatch]:
        """Return the rows of all members."""
        batches = _RowNumbers(self.test_size, self.eval_batch_size * self._world)
        self._check_shares(f"{self.test_size} test rows", len(batches), self.test_size // len(batches))
        return self._loader(batches, self.draw)

    def draw(self, rows: Integers) -> MemoryBatch:
        """Draw the rows with these numbers, for each member of the module."""
        members = self._module.ensemble if isinstance(self._module, HasEnsemble) else 1
        drawn = [self._draw_row(self.seed + member, int(row)) for member in range(members) for row in rows]
        context, noise, kernel, value, first = (
            torch.from_numpy(np.stack(parts).reshape(members, len(rows), *parts[0].shape))
            for parts in zip(*drawn, strict=True)
        )
        return {
            "context_SBNWK": context,
            "noise_SBNWK": noise,
            "kernel_SBWK": kernel,
            "value_SBNV": value,
            "first_SB": first,
        }

    def _draw_row(self, seed: int, row: int) -> tuple[np.ndarray[tuple[int, ...], np.dtype[np.generic]], ...]:
        rng = stream(seed, HELD_OUT, row)
        contexts = self.items, self.context, self.key_width
        context_NWK, noise_NWK = (rng.standard_normal(contexts, np.float32) for _ in range(2))
        kernel_WK = (rng.random(contexts[1:], np.float32) * 2 - 1) * self.context**-0.5
        value_NV = rng.standard_normal((self.items, self.value_width), np.float32)
        return context_NWK, noise_NWK, kernel_WK.astype(np.float32), value_NV, np.array(rng.integers(FAR))
