"""Base class of the tasks whose difficulty can change during training."""

from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from copy import copy, deepcopy
from difflib import get_close_matches
from typing import Any, Literal, Self, get_args, get_origin, get_type_hints

import torch
from jsonargparse import ArgumentParser

from datamodules.batch import Integers, TokenBatch
from datamodules.batches import Batches
from datamodules.errors import MOST, UserError
from datamodules.loader import BatchLoader
from datamodules.sequence_task import SequenceTask

PREFETCHED = 4  # batches that each worker of a loader may have prepared ahead


class _PhasedBatches:
    """The batches of several phases; the number of a batch over all epochs decides to which phase it belongs."""

    def __init__(self, phases: Sequence[Batches[Integers]], starts: torch.Tensor):
        self.phases, self.starts = phases, starts

    def __len__(self) -> int:
        return len(self.phases[0])

    def batch(self, epoch: int, number: int) -> Integers:
        phase = int((self.starts <= epoch * len(self) + number).sum()) - 1
        return self.phases[phase].batch(epoch, number)


class _CurrentRows:
    """A loader of the validation rows of the current phase, whose rows alone are in memory."""

    def __init__(self, task: "TunableTask"):
        self.task = task
        self.phase: TunableTask | None = None

    def _loader(self) -> BatchLoader[TokenBatch]:
        if self.phase is not self.task.current:
            self.phase = self.task.current
            self.loader = self.phase.unphased_validation()
        return self.loader

    def __len__(self) -> int:
        return len(self._loader())

    def __iter__(self) -> Iterator[TokenBatch]:
        return iter(self._loader())


class TunableTask(SequenceTask):
    """A task with knobs: arguments that a `Curriculum` may change during training.

    A subclass implements `tune`, whose arguments are the knobs. The task keeps each of them as an attribute of the same
    name.

    With phases (`plan`), training and validation use the knobs of the current phase; chance, ceiling and the test set
    are those of the arguments. The batches of a phase begin at a number counted over all epochs, so that they are the
    same for any number of ranks, and in a run that resumes with the same numbers.
    """

    _phases: Sequence["TunableTask"] = ()
    _starts = torch.zeros(0, dtype=torch.int64)

    @abstractmethod
    def tune(self, *args: Any, **knobs: Any) -> None:
        """Set the knobs and what depends on them; raise UserError if they do not fit."""

    def knob_types(self) -> dict[str, Any]:
        """Return the type of each knob, by name."""
        types = get_type_hints(type(self).tune)
        return {name: hint for name, hint in types.items() if name != "return"}

    def tuned(self, knobs: Mapping[str, Any]) -> Self:
        """Return the task with other values of some knobs."""
        other = copy(self)
        other._held_out, other._phases = {}, ()
        own = TunableTask.knob_types(self)  # the arguments of `tune`
        other.tune(**{name: knobs.get(name, getattr(self, name)) for name in own})
        return other

    def plan(self, phases: Sequence[Mapping[str, Any]]) -> None:
        """Train in phases, each with values of some knobs; the others keep the values of the arguments.

        Raises:
            UserError: A knob or a value does not fit, or a phase needs more tokens or longer rows than the task.
        """
        self._phases = [self._phase(f"Curriculum.phases[{i}]", knobs) for i, knobs in enumerate(phases)]
        # Workers are forked processes, and see the numbers in shared memory
        self._starts = torch.full((len(phases),), MOST)
        self._starts.share_memory_()  # type: ignore[no-untyped-call]
        self._starts[0] = 0

    @property
    def current(self) -> "TunableTask":
        """The task with the knobs of the phase that began last; the task itself without phases."""
        return self._phases[len(self.begun) - 1] if self._phases else self

    @property
    def begun(self) -> list[int]:
        """The numbers of the first batches of the phases that began."""
        return [start for start in self._starts.tolist() if start < MOST]

    @begun.setter
    def begun(self, starts: Sequence[int]) -> None:
        self._starts[: len(starts)] = torch.tensor(starts)

    def advance(self, number: int) -> None:
        """Begin the next phase with batch `number`, or with the first one after it that no worker has prepared."""
        self.begun = [*self.begun, number + PREFETCHED * self.num_workers]

    def train_batches(self, members: int, size: int) -> Batches[Integers]:
        """Return the global training batches, of `size` rows per ensemble member."""
        if not self._phases:
            return self.unphased_batches(members, size)
        return _PhasedBatches([phase.train_batches(members, size) for phase in self._phases], self._starts)

    def unphased_batches(self, members: int, size: int) -> Batches[Integers]:
        """Return the global training batches of the arguments."""
        return super().train_batches(members, size)

    def val_dataloader(self) -> BatchLoader[TokenBatch]:
        """Return the validation set, in each iteration that of the current phase."""
        if not self._phases:
            return super().val_dataloader()
        return _CurrentRows(self)  # type: ignore[return-value]  # Lightning takes any iterable

    def unphased_validation(self) -> BatchLoader[TokenBatch]:
        """Draw the validation set of the arguments."""
        return self._eval_loader("validation", self.fixed("validation", self.validation_size))

    def _phase(self, where: str, knobs: Mapping[str, Any]) -> "TunableTask":
        types = self.knob_types()
        for name in knobs:
            if name not in types:
                nearest = get_close_matches(name, types, n=1, cutoff=0.0)[0]
                raise UserError(f"{where}: {type(self).__name__} has no knob '{name}'; the nearest is '{nearest}'")
        try:
            phase = self.tuned({name: _checked(name, value, types[name]) for name, value in knobs.items()})
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        for name, needed, most in (
            ("seq_len", phase.seq_len, self.seq_len),
            ("vocab_size", phase.vocab_size, self.vocab_size),
        ):
            if needed > most:
                raise UserError(f"{where}: its {name} is {needed}, and the data has {most}, which no phase may exceed")
        return phase


def _checked(name: str, value: object, hint: Any) -> Any:
    """Return a knob's value in the knob's type."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        if value is None and type(None) not in get_args(hint):
            raise TypeError("the library takes None for a value that was not set")
        return parser.parse_object({"value": deepcopy(value)}).value  # it converts lists in place
    except Exception as error:  # the library's error type is not the same in all of its versions
        if get_origin(hint) is Literal:
            wanted = "one of " + ", ".join(map(repr, get_args(hint)))
        else:
            wanted = f"of type {hint.__name__ if isinstance(hint, type) else hint}"
        raise UserError(f"{name} must be {wanted}, not {value!r}") from error
