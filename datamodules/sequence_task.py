"""Base class of the tasks whose samples are rows of tokens with a label at each position.

Shapes: B rows, S ensemble members, T positions, U = T + 1 tokens of a row with the token that follows. An axis of
length 2 holds tokens and labels; rows_B2T is an integer array [B, 2, T].
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from lightning.pytorch.utilities import rank_zero_info

from datamodules.batch import IGNORE, HasEnsemble, Integers, SupportsCollate, TaskDataModule, TokenBatch
from datamodules.batches import Batches
from datamodules.errors import SEEDS, UserError, check_numbers
from datamodules.loader import BatchLoader, UnchangedLoader

SHOWN = 8  # test rows that `predict` takes without inputs
PADDING = IGNORE - 1  # in the place of a label behind the end of an input
TRAINING, HELD_OUT, TASK = range(3)  # first keys of independent random streams

Split = Literal["validation", "test"]


def stream(seed: int, *key: int) -> np.random.Generator:
    """Return the random generator of a seed and a key; generators with different keys are independent."""
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def held_out_stream(split: Split) -> np.random.Generator:
    """Return the random generator of a held-out split, which does not depend on the data's seed."""
    return stream(0, HELD_OUT, ("validation", "test").index(split))


def label_next(tokens_BU: Integers, labelled_BT: npt.NDArray[np.bool_] | None = None) -> Integers:
    """Return rows_B2T with the next token as label where `labelled_BT` (None: everywhere), and IGNORE elsewhere."""
    # Tokens and labels are separate in memory, so that tensors are made of them without a copy
    rows_2BT = np.empty((2, len(tokens_BU), tokens_BU.shape[1] - 1), np.int64)
    rows_2BT[0], rows_2BT[1] = tokens_BU[:, :-1], tokens_BU[:, 1:]
    if labelled_BT is not None:
        np.copyto(rows_2BT[1], IGNORE, where=~labelled_BT)
    return rows_2BT.swapaxes(0, 1)


def by_member(rows_R2T: Integers, members: int) -> Integers:
    """Split rows, which are in the order of the members, into rows_BS2T; rows_B2T for a single member."""
    # The row axis stays in front, where ranks take their part; `collate` moves the member axis there
    return rows_R2T if members == 1 else rows_R2T.reshape(members, -1, *rows_R2T.shape[1:]).swapaxes(0, 1)


def collate(rows: Integers) -> TokenBatch:
    """Make a batch of rows_B2T, [B, T], or of an ensemble's rows_BS2T, [S, B, T]."""
    tensor = torch.from_numpy(rows)
    tokens, labels = (tensor if rows.ndim == 3 else tensor.movedim(1, 0)).unbind(-2)
    return {"tokens": tokens.contiguous(), "labels": labels.contiguous()}


def collate_inputs(rows: Integers) -> TokenBatch:
    """Make a batch of the rows of inputs, with the length of each."""
    batch = collate(rows)
    given_BT = batch["labels"] != PADDING
    labels_BT = batch["labels"].where(given_BT, IGNORE)
    return {"tokens": batch["tokens"], "labels": labels_BT, "lengths": given_BT.sum(1)}


class _DrawnBatches:
    """Training batches drawn at random; each is a function of the seed and of its number, counted over all epochs."""

    def __init__(self, task: "SequenceTask", members: int, size: int):
        self.task, self.members, self.size = task, members, size

    def __len__(self) -> int:
        return self.task.epoch_size // self.size

    def batch(self, epoch: int, number: int) -> Integers:
        number += epoch * len(self)
        rngs = [stream(self.task.seed + member, TRAINING, number) for member in range(self.members)]
        drawn = zip(*(self.task.randomness(rng, self.size) for rng in rngs), strict=True)
        return by_member(self.task.rows(*map(np.concatenate, drawn)), self.members)


class _FixedBatches:
    """Batches of fixed rows in order; their sizes differ by at most 1, so that each has rows for every rank."""

    def __init__(self, rows_B2T: Integers, size: int):
        self.rows_B2T, self.count = rows_B2T, -(-len(rows_B2T) // size)

    def __len__(self) -> int:
        return self.count

    def batch(self, epoch: int, number: int) -> Integers:
        start, end = (i * len(self.rows_B2T) // self.count for i in (number, number + 1))
        return self.rows_B2T[start:end]


class SequenceTask(TaskDataModule):
    """Base of tasks on rows of tokens; its batches are `TokenBatch`.

    The label at position t is the token that follows token t, so it is aligned with the logits at t; it is `IGNORE`
    where there is no target. A module that trains S members at once (`HasEnsemble`) gets training batches [S, B, T]:
    member s has the rows of an ordinary run with `seed + s`. Held-out batches are always [B, T], and the same for every
    seed.

    A subclass sets `vocab_size`, `seq_len`, `chance` and `ceiling`, and implements `randomness`, `rows` and `parse`.

    Args:
        batch_size: Rows per device and step (and ensemble member).
        eval_batch_size: Rows per device and step in validation, test and predict.
        num_workers: Processes that prepare training batches: 0, 1, 2, 4 or 8.
        epoch_size: Rows per epoch; each epoch draws new ones.
        validation_size: Rows of the validation set.
        test_size: Rows of the test set.
        seed: Seed of the training rows; None for the run's seed (`seed_everything`).
        inputs: Inputs of `predict`, as text; None for the first test rows.

    Attributes:
        vocab_size: Tokens of the task, which are the numbers from 0 to vocab_size - 1; a module has as many logits.
        seq_len: T, the longest row.
        chance: Accuracy of the best guess that sees no input.
        ceiling: Best possible accuracy on the labelled positions of the test set; None where unknown.
        predicts_next: Whether each label is the token that follows in the row.
    """

    vocab_size: int
    seq_len: int
    chance: float
    ceiling: float | None
    predicts_next: bool = False

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
        sizes = {"validation_size": validation_size, "test_size": test_size}
        super().__init__(batch_size, eval_batch_size, num_workers, epoch_size, sizes)
        check_numbers("data", 0, SEEDS, seed=seed)
        if inputs is not None and not inputs:
            raise UserError("data.inputs is empty: give at least one input, or leave the key out")
        self.validation_size, self.test_size = validation_size, test_size
        self.seed = torch.initial_seed() if seed is None else seed
        self.inputs = inputs
        self._held_out: dict[Split, Integers] = {}

    @abstractmethod
    def randomness(self, rng: np.random.Generator, count: int) -> tuple[Integers, ...]:
        """Draw everything that is random in `count` rows, as arrays whose first axis has length `count`."""

    @abstractmethod
    def rows(self, *drawn: Integers) -> Integers:
        """Make rows_B2T of the arrays of `randomness`, concatenated over the members of an ensemble."""

    @abstractmethod
    def parse(self, text: str) -> list[int]:
        """Return the tokens of an input; raise UserError if the text is not an input of the task."""

    def draw(self, rng: np.random.Generator, count: int) -> Integers:
        """Draw `count` rows, rows_B2T."""
        return self.rows(*self.randomness(rng, count))

    def fixed(self, split: Split, count: int) -> Integers:
        """Return at most `count` rows_B2T of a held-out split, the same ones for every `seed`."""
        return self.draw(held_out_stream(split), count)

    def input_labels(self, tokens: list[int]) -> list[int]:
        """Return the labels of an input: the next token, and IGNORE at the last position."""
        return [*tokens[1:], IGNORE]

    def token_text(self, token: int) -> str:
        """Return one token as text, for pictures and tables."""
        return str(token)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return tokens as text."""
        return " ".join(map(self.token_text, tokens))

    def setup(self, stage: str) -> None:
        """Make the held-out rows and report chance and ceiling, once."""
        if isinstance(self._module, SupportsCollate):
            module, task = type(self._module).__name__, type(self).__name__
            raise UserError(f"data: {task} gives sequences of tokens, and {module} reads problems in words")
        if self._held_out:
            return
        sizes: dict[Split, int] = {"validation": self.validation_size, "test": self.test_size}
        self._held_out = {split: self.fixed(split, size) for split, size in sizes.items()}
        ceiling = "unknown" if self.ceiling is None else f"{self.ceiling:.4g}"
        rank_zero_info(f"{type(self).__name__}: chance is {self.chance:.4g}, the best possible accuracy {ceiling}")

    def train_batches(self, members: int, size: int) -> Batches[Integers]:
        """Return the global training batches, of `size` rows per ensemble member."""
        self._check_epoch(size)
        return _DrawnBatches(self, members, size)

    def train_dataloader(self) -> BatchLoader[TokenBatch]:
        """Return the training batches, the same global batches for any number of ranks."""
        members = self._module.ensemble if isinstance(self._module, HasEnsemble) else 1
        batches = self.train_batches(members, self.batch_size * self._world)
        return self._train_loader(batches, collate)

    def val_dataloader(self) -> BatchLoader[TokenBatch]:
        """Return the validation set."""
        return self._eval_loader("validation", self._held_out["validation"])

    def test_dataloader(self) -> BatchLoader[TokenBatch]:
        """Return the test set."""
        return self._eval_loader("test", self._held_out["test"])

    def predict_dataloader(self) -> UnchangedLoader[TokenBatch]:
        """Return `inputs` as one batch, padded on the right, or the first test rows if there are none."""
        if self.inputs is None:
            return UnchangedLoader(self._eval_loader("test", self._held_out["test"][:SHOWN]))
        try:
            parsed = [self.parse(text) for text in self.inputs]
        except UserError as error:
            raise UserError(f"data.inputs: {error}") from error
        for text, tokens in zip(self.inputs, parsed, strict=True):
            if not 0 < len(tokens) <= self.seq_len:
                raise UserError(f"data.inputs: '{text}' has {len(tokens)} tokens, not 1 to {self.seq_len}")
        rows_B2T = np.zeros((len(parsed), 2, max(map(len, parsed))), np.int64)
        rows_B2T[:, 1] = PADDING
        for row_2T, tokens in zip(rows_B2T, parsed, strict=True):
            row_2T[:, : len(tokens)] = tokens, self.input_labels(tokens)
        return UnchangedLoader(self._eval_loader("predict", rows_B2T, len(rows_B2T)))

    def _eval_loader(self, name: str, rows_B2T: Integers, size: int | None = None) -> BatchLoader[TokenBatch]:
        batches = _FixedBatches(rows_B2T, size or self.eval_batch_size * self._world)
        self._check_shares(f"{len(rows_B2T)} {name} rows", len(batches), len(rows_B2T) // len(batches))
        return self._loader(batches, collate_inputs if name == "predict" else collate)
