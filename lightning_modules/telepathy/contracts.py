"""What an examination and the gates need of a module with a bridge."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from lightning import Trainer
from lightning.pytorch.cli import OptimizerCallable
from torch import Tensor, nn

from datamodules.problems import Problem
from lightning_modules.core.contracts import HasCounts
from lightning_modules.telepathy.batch import EvaluationBatch
from lightning_modules.telepathy.bottleneck import Bottleneck
from lightning_modules.telepathy.encoding import Encoding
from lightning_modules.telepathy.objectives import Objective, ObjectiveName
from lightning_modules.telepathy.target import Target
from lightning_modules.telepathy.text_prefix import TextPrefix


class Bridged(Protocol):
    """A module with a bridge and a target, as far as everything here needs it."""

    target: Target

    @property
    def trainer(self) -> Trainer:
        """The trainer."""
        ...

    @property
    def answer_limit(self) -> int:
        """Length limit of generated answers, in tokens."""
        ...

    def encode(self, batch: Any) -> Encoding:
        """Return soft_BKD with its codes."""
        ...

    def collate(self, problems: Sequence[Problem], training: bool) -> Any:
        """Return a batch of problems, an `EvaluationBatch` unless it is for training."""
        ...


class Examined(Bridged, HasCounts, Protocol):
    """A module with a bridge, as far as an examination needs it.

    Attributes:
        bottleneck: What makes codes of soft tokens.
        text_prefix: The learned prefix of the text baseline, if there is one.
    """

    bottleneck: Bottleneck
    text_prefix: TextPrefix | None

    @property
    def device(self) -> torch.device:
        """The device of the module."""
        ...

    def __call__(self, batch: EvaluationBatch) -> Tensor:
        """Return soft_BKD."""
        ...

    def log(self, name: str, value: float) -> None:
        """Log a value."""
        ...


class Gated(Bridged, Protocol):
    """A module with a bridge, as far as gates need it."""

    optimizer: OptimizerCallable
    warmup_steps: int
    objectives: dict[ObjectiveName, Objective]

    def read(self, batch: Any) -> Tensor:
        """Return states_BSC at the questions."""
        ...

    def train(self, mode: bool = True) -> Any:
        """Set the mode of training."""
        ...

    def eval(self) -> Any:
        """Set the mode of evaluation."""
        ...

    def parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state without that of the frozen models."""
        ...

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> Any:
        """Restore a state."""
        ...
