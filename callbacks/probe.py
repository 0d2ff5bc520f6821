"""What callbacks share that measure on held-out rows of tokens: when they measure, and whose rows they take."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar

from lightning.pytorch import Callback, LightningModule, Trainer

from callbacks.at_validations import AtValidations
from callbacks.base import check_positive, refuse_second
from callbacks.held_out import evaluation
from callbacks.throughput import off_the_clock
from datamodules import TextCorpus
from datamodules.batch import Integers, TokenBatch
from datamodules.errors import UserError
from datamodules.mixture import all_tasks
from datamodules.sequence_task import Split, collate
from lightning_modules.core.contracts import connected
from lightning_modules.core.decoder import Decoder
from lightning_modules.core.ensemble_module import EnsembleModule
from lightning_modules.core.reporting import is_dry_run

T = TypeVar("T")

DRY_ROWS = 2


class Probe(AtValidations):
    """A callback that measures at the end of `validate` and `test`, and of some validations during a fit.

    Args:
        rows: Rows that a measure takes.
        every_n_steps: In a fit, measure at the first validation after each n optimizer steps; 0 for never.

    Raises:
        UserError: A number is too small; at `setup`, there are two of these callbacks.
    """

    def __init__(self, rows: int, every_n_steps: int) -> None:
        check_positive(self, rows=rows)
        super().__init__(every_n_steps)
        self.rows = rows

    @abstractmethod
    def measure(self, trainer: Trainer, module: EnsembleModule, split: Split) -> None:
        """Measure and report under `<split>/`; every rank calls it, in eval mode and without gradients."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second callback of the class, and modules of another kind."""
        refuse_second(trainer, self)
        if not isinstance(pl_module, EnsembleModule):
            name = type(self).__name__
            raise UserError(
                f"{name} reads models of token sequences, such as GroundThink, not {type(pl_module).__name__}"
            )

    def at_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure."""
        self._measure(trainer, pl_module, "validation")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure."""
        self._measure(trainer, pl_module, "test")

    def _measure(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        assert isinstance(pl_module, EnsembleModule)  # see `setup`
        with off_the_clock(trainer), evaluation(trainer, pl_module):
            self.measure(trainer, pl_module, split)

    def count(self, trainer: Trainer) -> int:
        """Return the number of rows; a dry run (`fast_dev_run`) only tries a few."""
        return min(self.rows, DRY_ROWS) if is_dry_run(trainer) else self.rows

    def task(self, trainer: Trainer, kind: type[T], wanted: str) -> T:
        """Return the run's task of a kind, or the first one of a mixture.

        Raises:
            UserError: The data has none; says that `wanted` is needed.
        """
        data = connected(trainer).datamodule
        for task in all_tasks(data):
            if isinstance(task, kind):
                return task
        raise UserError(f"{type(self).__name__} needs {wanted} under data, not {type(data).__name__}")

    def text(self, trainer: Trainer) -> TextCorpus:
        """Return the run's text, or the first one of a mixture.

        Raises:
            UserError: The data has none.
        """
        return self.task(trainer, TextCorpus, "a text, such as TextCorpus,")

    def check_length(self, module: LightningModule, length: int) -> None:
        """Check that a model can read rows of a length.

        Raises:
            UserError: Its position embedding is shorter.
        """
        network = module.network if isinstance(module, EnsembleModule) else None
        positions = network.position_embedding if isinstance(network, Decoder) else None
        if positions is not None and (longest := positions.weight.shape[-2]) < length:
            name = type(self).__name__
            raise UserError(f"{name} reads rows of {length} tokens, and the model has positions for {longest}")


@contextmanager
def naming(callback: Callback) -> Iterator[None]:
    """Begin what a mistake of the user raises inside with the name of the callback."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{type(callback).__name__}: {error}") from error


def batch_on(module: LightningModule, rows_B2T: Integers) -> TokenBatch:
    """Return rows as a batch on the module's device."""
    batch = collate(rows_B2T)
    return {"tokens": batch["tokens"].to(module.device), "labels": batch["labels"].to(module.device)}
