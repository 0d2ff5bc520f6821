"""Tasks whose samples are rows of tokens, with what to say after each of them.

Shapes: B rows, S members of an ensemble, T positions, U = T + 1 tokens of a row and the one after it; an axis of 2
holds tokens and labels.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from datamodules.batch import IGNORE
from datamodules.batches import AsGiven, Batches, BatchLoader
from datamodules.errors import UserError

SHOWN = 8  # test rows that `predict` takes where no inputs are given
TRAINING, HELD_OUT, TASK = range(3)  # streams of random numbers that never meet

Split = Literal["validation", "test"]


def stream(seed: int, *key: int) -> np.random.Generator:
    """Return the random numbers of a seed and a key; those of another key have nothing in common with them."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def label_next(tokens_BU: np.ndarray, asked_BT: np.ndarray | None = None) -> np.ndarray:
    """Return rows_B2T whose label is the next token, where `asked` (None: everywhere)."""
    # Tokens and labels apart in memory, so that tensors are made of them without a copy
    rows_2BT = np.empty((2, len(tokens_BU), tokens_BU.shape[1] - 1), np.int64)
    rows_2BT[0], rows_2BT[1] = tokens_BU[:, :-1], tokens_BU[:, 1:]
    if asked_BT is not None:
        np.copyto(rows_2BT[1], IGNORE, where=~asked_BT)
    return rows_2BT.swapaxes(0, 1)


def by_member(rows_R2T: np.ndarray, members: int) -> np.ndarray:
    """Return rows_BS2T of member after member's rows; rows_B2T for a single one."""
    # Rows stay in front, where ranks take their shares; `collate` moves members there
    return rows_R2T if members == 1 else rows_R2T.reshape(members, -1, *rows_R2T.shape[1:]).swapaxes(0, 1)


def collate(rows: np.ndarray) -> dict[str, Tensor]:
    """Make a batch of rows_B2T, or of an ensemble's rows_BS2T: tokens and labels, [B, T] or [S, B, T]."""
    tensor = torch.from_numpy(rows)
    tokens, labels = (tensor if rows.ndim == 3 else tensor.movedim(1, 0)).unbind(-2)
    return {"tokens": tokens.contiguous(), "labels": labels.contiguous()}


class _DrawnBatches:
    """Batches drawn on the fly: each is a function of the seed and of its number, counted over all epochs."""

    def __init__(self, task: "SequenceTask", members: int, size: int):
        self.task, self.members, self.size = task, members, size

    def __len__(self) -> int:
        return self.task.epoch_size // self.size

    def batch(self, epoch: int, number: int) -> np.ndarray:
        number += epoch * len(self)
        rngs = [stream(self.task.seed + member, TRAINING, number) for member in range(self.members)]
        drawn = zip(*(self.task.randomness(rng, self.size) for rng in rngs), strict=True)
        return by_member(self.task.rows(*map(np.concatenate, drawn)), self.members)


class _FixedBatches:
    """Rows in their order, in batches of even size, so that each has a share for every rank."""

    def __init__(self, rows_B2T: np.ndarray, size: int):
        self.rows_B2T, self.count = rows_B2T, -(-len(rows_B2T) // size)

    def __len__(self) -> int:
        return self.count

    def batch(self, epoch: int, number: int) -> np.ndarray:
        start, end = (i * len(self.rows_B2T) // self.count for i in (number, number + 1))
        return self.rows_B2T[start:end]


class SequenceTask(LightningDataModule):
    """Base of tasks on rows of tokens; a batch is `{"tokens": [B, T], "labels": [B, T]}`, integers.

    The label at position t is what comes after token t, so it stands beside the logits at t; it is -100 where nothing
    is asked. A module that trains S members at once (`ensemble: int`) gets training batches of [S, B, T]: member s has
    the rows of an ordinary run with `seed + s`. Held-out batches are [B, T] in any case, and the same for every seed.

    A subclass sets `vocab_size`, `seq_len`, `chance` and `ceiling`, and writes `randomness`, `rows` and `parse`.

    Args:
        batch_size: Rows a device and step (and member).
        eval_batch_size: Rows a device and step of validation, test and predict.
        num_workers: Processes that prepare training batches; 0, 1, 2, 4 or 8.
        epoch_size: Rows that count as one epoch; each epoch draws new ones.
        validation_size: Rows of the validation set.
        test_size: Rows of the test set.
        seed: Which training rows are drawn; None for the run's seed (`seed_everything`).
        inputs: What `predict` is given, as text of the task; None for the first test rows.

    Attributes:
        vocab_size: Tokens that the task knows; a module has as many logits.
        seq_len: T.
        chance: Accuracy of the best guess that sees no input.
        ceiling: Best accuracy on the labelled positions of the test set that is possible; None where nobody knows it.
    """

    vocab_size: int
    seq_len: int
    chance: float
    ceiling: float | None

    def __init__(
        self,
        batch_size: int = 64,
        eval_batch_size: int = 256,
        num_workers: int = 0,
        epoch_size: int = 100_000,
        validation_size: int = 512,
        test_size: int = 2048,
        seed: int | None = None,
        inputs: list[str] | None = None,
    ):
        super().__init__()
        sizes = {"batch_size": batch_size, "eval_batch_size": eval_batch_size}
        for name, size in {**sizes, "validation_size": validation_size, "test_size": test_size}.items():
            if size < 1:
                raise UserError(f"data.{name} must be at least 1, not {size}")
        if num_workers not in (0, 1, 2, 4, 8):
            raise UserError(f"data.num_workers must be 0, 1, 2, 4 or 8, not {num_workers}")
        if epoch_size < batch_size:
            raise UserError(f"data.epoch_size ({epoch_size}) is smaller than data.batch_size ({batch_size})")
        if seed is not None and seed < 0:
            raise UserError(f"data.seed must be at least 0, not {seed}")
        if inputs is not None and not inputs:
            raise UserError("data.inputs is empty: give at least one, or leave it out")
        self.batch_size, self.eval_batch_size, self.num_workers = batch_size, eval_batch_size, num_workers
        self.epoch_size, self.validation_size, self.test_size = epoch_size, validation_size, test_size
        self.seed = torch.initial_seed() if seed is None else seed
        self.inputs = inputs
        self._held_out: dict[str, np.ndarray] = {}

    @abstractmethod
    def randomness(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, ...]:
        """Draw what is random in `count` rows, as arrays whose first axis is `count`."""

    @abstractmethod
    def rows(self, *drawn: np.ndarray) -> np.ndarray:
        """Make rows_B2T of what `randomness` drew; asked once for all members of an ensemble."""

    @abstractmethod
    def parse(self, text: str) -> list[int]:
        """Read the tokens of an input; raises ValueError, in a sentence, where it is none."""

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Draw `count` rows_B2T."""
        return self.rows(*self.randomness(rng, count))

    def fixed(self, split: Split, count: int) -> np.ndarray:
        """Return the held-out rows_B2T of a split: at most `count`, and the same for every `seed`."""
        return self.draw(held_out_stream(split), count)

    def input_labels(self, tokens: list[int]) -> list[int]:
        """Return the labels of an input: the next token, as far as it is given."""
        return [*tokens[1:], IGNORE]

    def token_text(self, token: int) -> str:
        """Return one token as text, for pictures and tables."""
        return str(token)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return tokens as text."""
        return " ".join(map(self.token_text, tokens))

    def setup(self, stage: str) -> None:
        """Make the held-out rows and tell what scores mean, once."""
        if hasattr(self._module, "collate"):
            reader, own = type(self._module).__name__, type(self).__name__
            raise UserError(f"data: {own} gives sequences of tokens, and {reader} reads problems in words")
        if self._held_out:
            return
        sizes: dict[Split, int] = {"validation": self.validation_size, "test": self.test_size}
        self._held_out = {split: self.fixed(split, size) for split, size in sizes.items()}
        ceiling = "unknown" if self.ceiling is None else f"{self.ceiling:.4g}"
        rank_zero_info(f"{type(self).__name__}: chance is {self.chance:.4g}, the best possible accuracy {ceiling}")

    def train_batches(self, members: int, size: int) -> Batches:
        """Return the global training batches, of `size` rows a member."""
        if self.epoch_size < size:
            raise UserError(f"data.epoch_size ({self.epoch_size}) is smaller than a batch of all devices ({size})")
        return _DrawnBatches(self, members, size)

    def train_dataloader(self) -> BatchLoader:
        """Training batches, the same global batch whatever the number of ranks."""
        options: dict[str, Any] = {}
        if self.num_workers:
            # Forked, since tables are shared as they are and a datamodule with its trainer cannot be pickled
            options = {"num_workers": self.num_workers, "prefetch_factor": 4, "multiprocessing_context": "fork"}
            options["persistent_workers"] = True
        members = getattr(self._module, "ensemble", 1)
        return self._loader(self.train_batches(members, self.batch_size * self._world), **options)

    def val_dataloader(self) -> BatchLoader:
        """The validation set."""
        return self._eval_loader("validation", self._held_out["validation"])

    def test_dataloader(self) -> BatchLoader:
        """The test set."""
        return self._eval_loader("test", self._held_out["test"])

    def predict_dataloader(self) -> AsGiven:
        """The given inputs as one batch, padded on the right; without any, the first test rows."""
        if self.inputs is None:
            return AsGiven(self._eval_loader("test", self._held_out["test"][:SHOWN]))
        parsed = [self.parse(text) for text in self.inputs]
        for text, tokens in zip(self.inputs, parsed, strict=True):
            if not 0 < len(tokens) <= self.seq_len:
                raise UserError(f"data.inputs: '{text}' has {len(tokens)} tokens, where 1 to {self.seq_len} may be")
        rows_B2T = np.zeros((len(parsed), 2, max(map(len, parsed))), np.int64)
        rows_B2T[:, 1] = IGNORE
        for row_2T, tokens in zip(rows_B2T, parsed, strict=True):
            row_2T[:, : len(tokens)] = tokens, self.input_labels(tokens)
        return AsGiven(self._eval_loader("predict", rows_B2T, len(rows_B2T)))

    def _eval_loader(self, name: str, rows_B2T: np.ndarray, size: int | None = None) -> BatchLoader:
        batches = _FixedBatches(rows_B2T, size or self.eval_batch_size * self._world)
        if len(rows_B2T) // len(batches) < self._world:
            raise UserError(
                f"data: {len(rows_B2T)} {name} rows in {len(batches)} batches leave some of {self._world} devices "
                "without any: use more rows, larger batches or fewer devices"
            )
        return self._loader(batches)

    def _loader(self, batches: Batches, **options: Any) -> BatchLoader:
        rank = self.trainer.global_rank if self.trainer else 0
        return BatchLoader(batches, collate, rank, self._world, **options)

    @property
    def _world(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    @property
    def _module(self) -> torch.nn.Module | None:
        return self.trainer.lightning_module if self.trainer else None


def held_out_stream(split: Split) -> np.random.Generator:
    """Return the random numbers of a held-out split, which no seed changes."""
    return stream(0, HELD_OUT, ("validation", "test").index(split))
