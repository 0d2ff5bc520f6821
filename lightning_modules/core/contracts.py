"""What lines, datamodules and callbacks expect of each other.

Batches and what a datamodule asks of a module are in `datamodules.batch`, for data imports nothing of the lines.

Shapes: S ensemble members, B batch, T positions, V vocabulary.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, cast, runtime_checkable

from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch import Tensor

from lightning_modules.core.samples import EvalSample


@dataclass(frozen=True)
class Workload:
    """The size of one batch on one rank, from host-side shapes alone (no device synchronisation).

    Attributes:
        samples: Sequences, problems or images in the batch.
        tokens: Positions that the trained network processes; 0 where the word has no meaning.
        flops: Floating-point operations of forward and backward together (a multiply-add counts two), without
            recomputation; None where the module does not know.
        padding: Positions among `tokens` that are padding; None where the module does not know.
    """

    samples: int
    tokens: int = 0
    flops: int | None = None
    padding: int | None = None


@runtime_checkable
class SupportsWorkload(Protocol):
    """A module that knows the size of a batch; the `Throughput` callback reports its rates."""

    def workload(self, batch: Any) -> Workload:
        """Return the size of one training batch."""
        ...


@runtime_checkable
class SupportsSampleEval(Protocol):
    """A module that is evaluated by generation; the `QuickEval` callback calls it."""

    def sample_eval(self, batch: Any) -> list[EvalSample]:
        """Answer every sample of a batch and score the answers."""
        ...


@runtime_checkable
class SupportsQuestions(Protocol):
    """A module that answers questions in words; the command `generate` calls it."""

    def answer(self, questions: Sequence[str], limit: int) -> list[str]:
        """Answer questions with at most `limit` tokens each."""
        ...


@dataclass(frozen=True)
class Figure:
    """A number with the bound that it has to keep.

    Attributes:
        name: Name of the measure.
        value: The number; NaN keeps no bound.
        bound: The smallest allowed number, or the largest one under `at_most`.
        at_most: Whether the bound is an upper one.
        hits: Of a proportion, whether each sample is a hit.
    """

    name: str
    value: float
    bound: float
    at_most: bool = False
    hits: Sequence[bool] | None = None

    @property
    def passed(self) -> bool:
        """Whether the number keeps its bound."""
        return self.value <= self.bound if self.at_most else self.value >= self.bound


@dataclass(frozen=True)
class Gate:
    """A check that a module passes before it is trained.

    Attributes:
        name: Name of the gate.
        figures: Its figures, all of which have to keep their bounds.
        meaning: One sentence on what a failure means.
    """

    name: str
    figures: Sequence[Figure]
    meaning: str

    @property
    def passed(self) -> bool:
        """Whether every figure keeps its bound."""
        return all(figure.passed for figure in self.figures)


@runtime_checkable
class SupportsGates(Protocol):
    """A module that can be checked before it is trained; the `Gates` callback calls it."""

    def gates(self, count: int, least_accuracy: float, steps: int) -> Iterator[Gate]:
        """Run the gates one after the other, with `count` held-out samples and at most `steps` steps of training."""
        ...


@runtime_checkable
class SupportsActivations(Protocol):
    """A module whose activations can be read by site."""

    def activations(self, tokens: Tensor, sites: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits_SBTV, and for each module that matches `sites` its output with a first axis of S."""
        ...


@runtime_checkable
class HasMembers(Protocol):
    """A module that keeps the value of each measure for each ensemble member: name -> values_S."""

    members: dict[str, Tensor]


@runtime_checkable
class HasCounts(Protocol):
    """A module that keeps the counts and intervals of its measures, by metric name, for `results.json`.

    Attributes:
        counts: Number of samples of a measure, for each ensemble member the same.
        hits: Number of hits of a proportion: one per ensemble member.
        intervals: 95 % intervals, (low, high).
    """

    counts: dict[str, int]
    hits: dict[str, list[int]]
    intervals: dict[str, tuple[float, float]]


OnNonfinite = Literal["stop", "continue"]  # what a run does when its loss or a trained parameter is not finite


@runtime_checkable
class HasNonfinitePolicy(Protocol):
    """A module that says what a run does when it diverges."""

    on_nonfinite: OnNonfinite


@runtime_checkable
class HasVocabulary(Protocol):
    """A datamodule of token sequences, with both of these sizes.

    Attributes:
        vocab_size: Tokens that the task knows.
        seq_len: Longest row.
    """

    vocab_size: int
    seq_len: int


@runtime_checkable
class HasBounds(Protocol):
    """A datamodule that knows what accuracies mean, with both of these bounds.

    Attributes:
        chance: Accuracy of the best guess that sees no input.
        ceiling: Best possible accuracy on the labelled positions of the test set; None where unknown.
    """

    chance: float
    ceiling: float | None


@runtime_checkable
class SupportsTokenText(Protocol):
    """A datamodule whose tokens can be read."""

    def token_text(self, token: int) -> str:
        """Return one token as text."""
        ...


@runtime_checkable
class HasCharacters(Protocol):
    """A datamodule of texts, whose tokens stand for characters; its vocabulary may lack some."""

    def tokens_per_character(self, split: Literal["validation", "test"]) -> float:
        """Return tokens / characters of a held-out text."""
        ...

    def unknown_characters(self, text: str) -> list[str]:
        """Return the characters of a text that have no token."""
        ...


@runtime_checkable
class StatefulNetwork(Protocol):
    """A network that also runs one position at a time, carrying a state; generation uses it."""

    def init_state(self, batch: int) -> Any:
        """Return the state before the first position of `batch` rows."""
        ...

    def step(self, token_B: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return logits_BV at the next position, and the state after it."""
        ...


@runtime_checkable
class SupportsSampleDataloader(Protocol):
    """A datamodule that gives a few held-out samples for evaluation amid training."""

    def sample_dataloader(self, count: int) -> Iterable[Any]:
        """Return batches of the first `count` validation samples."""
        ...


class ConnectedTrainer(Protocol):
    """Attributes that Lightning sets on every trainer but does not declare on the class."""

    callbacks: list[Callback]
    datamodule: LightningDataModule | None
    fast_dev_run: int | bool
    log_every_n_steps: int


def connected(trainer: Trainer) -> ConnectedTrainer:
    """Return the trainer, for access to the attributes that its class does not declare."""
    return cast(ConnectedTrainer, trainer)
