"""Training on several tasks at once."""

from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np

from datamodules.batch import Integers, TokenBatch
from datamodules.batches import Batches
from datamodules.errors import SIZE, UserError, check_numbers
from datamodules.loader import BatchLoader, UnchangedLoader
from datamodules.sequence_task import TASK, SequenceTask, Split, stream
from datamodules.tunable_task import TunableTask


class _MixedBatches:
    """Batches of several tasks; the number of a batch over all epochs decides which task it is from."""

    def __init__(self, tasks: Sequence[Batches[Integers]], weights: Sequence[float], count: int):
        self.tasks, self.count = tasks, count
        self.bounds = np.cumsum(weights) / np.sum(weights)

    def __len__(self) -> int:
        return self.count

    def batch(self, epoch: int, number: int) -> Integers:
        number += epoch * self.count
        # The same for every seed, so that the members of an ensemble are what separate runs are
        task = self.tasks[int(np.searchsorted(self.bounds, stream(0, TASK, number).random(), side="right"))]
        return task.batch(*divmod(number, len(task)))


class Mixture(TunableTask):
    """Each training batch is from one of several tasks, drawn by weight, the same one for every seed and on every rank.

    Tasks share the tokens: token 7 of one task is token 7 of another. Each task keeps its own batch size and length. A
    task without an order, such as `NeedleGym` or `TextCorpus`, draws new rows for each batch; the others give the batch
    of the step's number, so that a part of their batches is left out in each pass.

    The held-out sets, `chance` and `ceiling` are those of one of the tasks, so that accuracy has one meaning. Test
    another one with `held_out`, for example `python main.py test --data.held_out 1`.

    Two needle batches for one batch of text::

        data:
          class_path: Mixture
          init_args:
            weights: [2, 1]
            tasks:
              - {class_path: NeedleGym, init_args: {needles: 8, seq_len: 256}}
              - {class_path: TextCorpus, init_args: {seq_len: 256, batch_size: 32}}

    The knobs are `weights` and those of the tasks. A task's knob goes to all tasks that have it.

    Args:
        tasks: The tasks.
        weights: Relative frequency of each task's batches; None for equal ones.
        held_out: Index of the task that is validated and tested, from 0.
        epoch_batches: Batches per epoch.
        num_workers: Processes that prepare training batches: 0, 1, 2, 4 or 8.
    """

    def __init__(
        self,
        tasks: list[SequenceTask],
        weights: list[float] | None = None,
        held_out: int = 0,
        epoch_batches: int = 1000,
        num_workers: int = 0,
    ):
        if not tasks:
            raise UserError("data.tasks is empty: give at least one task")
        check_numbers("data", 0, len(tasks) - 1, held_out=held_out)
        check_numbers("data", 1, SIZE, epoch_batches=epoch_batches)
        self.tasks, self.held_out, self.epoch_batches = tasks, held_out, epoch_batches
        main = self.main
        super().__init__(
            batch_size=main.batch_size,
            eval_batch_size=main.eval_batch_size,
            num_workers=num_workers,
            epoch_size=epoch_batches * main.batch_size,
            validation_size=main.validation_size,
            test_size=main.test_size,
            inputs=main.inputs,
        )
        self.tune([1.0] * len(tasks) if weights is None else weights)

    @property
    def main(self) -> SequenceTask:
        """The task that is validated and tested."""
        return self.tasks[self.held_out]

    def tune(self, weights: list[float]) -> None:
        """Set the weights.

        Raises:
            UserError: There is not one weight per task, a weight is negative, or all are 0.
        """
        if len(weights) != len(self.tasks):
            raise UserError(f"data.weights has {len(weights)} numbers for {len(self.tasks)} tasks")
        for number, weight in enumerate(weights):
            check_numbers("data", 0, **{f"weights[{number}]": weight})
        if not any(weights):
            raise UserError("data.weights are all 0: give at least one task a weight")
        self.weights = weights

    def knob_types(self) -> dict[str, Any]:
        """Return the type of `weights` and of the knobs of all tasks, by name."""
        types: dict[str, Any] = {}
        for task in self._tunable:
            types |= task.knob_types()
        return types | super().knob_types()

    @property
    def _tunable(self) -> list[TunableTask]:
        return [task for task in self.tasks if isinstance(task, TunableTask)]

    def tuned(self, knobs: Mapping[str, Any]) -> Self:
        """Return the mixture with other values of some knobs."""
        other = super().tuned(knobs)
        other.tasks = [_tuned(task, knobs) for task in self.tasks]
        return other

    @property
    def vocab_size(self) -> int:  # type: ignore[override]  # a text is read when its vocabulary is needed
        """Tokens of the task with the most."""
        return max(task.vocab_size for task in self.tasks)

    @property
    def seq_len(self) -> int:  # type: ignore[override]  # likewise
        """Longest row of all tasks."""
        return max(task.seq_len for task in self.tasks)

    @property
    def chance(self) -> float:  # type: ignore[override]  # likewise
        """Chance of the task that is validated and tested."""
        return self.main.chance

    @property
    def ceiling(self) -> float | None:  # type: ignore[override]  # likewise
        """Best possible accuracy in the task that is validated and tested."""
        return self.main.ceiling

    @property
    def predicts_next(self) -> bool:  # type: ignore[override]  # likewise
        """Whether each label of each task is the token that follows in the row."""
        return all(task.predicts_next for task in self.tasks)

    def setup(self, stage: str) -> None:
        """Set up the tasks."""
        for task in self.tasks:
            task.trainer = self.trainer
            task.setup(stage)

    def state_dict(self) -> dict[str, Any]:
        """Return the state of each task, such as the vocabulary of a text, for a checkpoint."""
        return {"tasks": [task.state_dict() for task in self.tasks]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Give the tasks their states of a checkpoint.

        Raises:
            UserError: It has another number of tasks, or a task cannot take its state.
        """
        states = state_dict["tasks"]
        if len(states) != len(self.tasks):
            raise UserError(f"data.tasks: there are {len(self.tasks)}, and the checkpoint was trained on {len(states)}")
        for task, state in zip(self.tasks, states, strict=True):
            if state:
                task.load_state_dict(state)

    def unphased_batches(self, members: int, size: int) -> Batches[Integers]:
        """Return the global training batches, with the batch size of each task."""
        batches = [task.train_batches(members, task.batch_size * self._world) for task in self.tasks]
        return _MixedBatches(batches, self.weights, self.epoch_batches)

    def fixed(self, split: Split, count: int) -> Integers:
        """Return held-out rows of the task that is validated and tested."""
        return self.main.fixed(split, count)

    def val_dataloader(self) -> BatchLoader[TokenBatch]:
        """Return the validation set of one task, in each iteration that of the current phase."""
        return super().val_dataloader() if self._phases else self.main.val_dataloader()

    def unphased_validation(self) -> BatchLoader[TokenBatch]:
        """Draw the validation set of one task."""
        return self.main.unphased_validation() if isinstance(self.main, TunableTask) else self.main.val_dataloader()

    def test_dataloader(self) -> BatchLoader[TokenBatch]:
        """Return the test set of one task."""
        return self.main.test_dataloader()

    def predict_dataloader(self) -> UnchangedLoader[TokenBatch]:
        """Return the inputs of one task, or its first test rows."""
        return self.main.predict_dataloader()

    def randomness(self, rng: np.random.Generator, count: int) -> tuple[Integers, ...]:
        """Draw what is random in rows of the task that is validated and tested."""
        return self.main.randomness(rng, count)

    def rows(self, *drawn: Integers) -> Integers:
        """Make rows_B2T of the task that is validated and tested."""
        return self.main.rows(*drawn)

    def parse(self, text: str) -> list[int]:
        """Return the tokens of an input of the task that is validated and tested."""
        return self.main.parse(text)

    def input_labels(self, tokens: list[int]) -> list[int]:
        """Return the labels of an input of the task that is validated and tested."""
        return self.main.input_labels(tokens)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return tokens as text of the task that is validated and tested."""
        return self.main.decode(tokens)

    def token_text(self, token: int) -> str:
        """Return one token as text of the task that is validated and tested."""
        return self.main.token_text(token)


def main_task(data: object) -> object:
    """Return the task that is validated and tested: one of a mixture's, or the data itself."""
    return main_task(data.main) if isinstance(data, Mixture) else data


def all_tasks(data: object) -> list[object]:
    """Return the tasks of a mixture and of the mixtures inside it, in order; or the data itself."""
    return [inner for task in data.tasks for inner in all_tasks(task)] if isinstance(data, Mixture) else [data]


def _tuned(task: SequenceTask, knobs: Mapping[str, Any]) -> SequenceTask:
    """Return the task with those of the knobs that it has."""
    if not isinstance(task, TunableTask):
        return task
    types = task.knob_types()
    return task.tuned({name: value for name, value in knobs.items() if name in types})
