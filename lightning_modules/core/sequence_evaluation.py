"""Validation, test and prediction of an autoregressive network.

Shapes: S ensemble members, B batch, T positions, V vocabulary.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor, nn

from datamodules.batch import TokenBatch
from datamodules.mixture import main_task
from datamodules.sequence_task import Split
from lightning_modules.core.contracts import HasBounds, HasCharacters, HasVocabulary, SupportsTokenText, connected
from lightning_modules.core.ensemble_module import EnsembleModule
from lightning_modules.core.metrics import LastStep, TokenMeasures
from lightning_modules.core.predictions import draw_attention, predict
from lightning_modules.core.reporting import is_dry_run, record_proportion


class SequenceEvaluation(EnsembleModule):
    """A network, alone or as an ensemble, as far as validation, test and prediction go.

    A line of research may write `make_measures` and `update_measures` (measures of the line) and `test_measures`
    (measures of the parameters).

    Args:
        make_network: Makes one network with random weights; called once per seed, with that seed set.
        seeds: One seed per member.

    Attributes:
        measures: The measures of validation and test.
        last_step: What validation reports of the last training step.
    """

    def __init__(self, make_network: Callable[[], nn.Module], seeds: Sequence[int]):
        super().__init__(make_network, seeds)
        self.measures = self.make_measures()
        self.last_step = LastStep()
        self._shown: Tensor | None = None  # the input whose attention the test draws

    def make_measures(self) -> TokenMeasures:
        """Return the measures of validation and test."""
        return TokenMeasures(self.ensemble)

    def update_measures(self, outputs: tuple[Tensor, ...], batch: TokenBatch) -> None:
        """Add a held-out batch to `self.measures`, given the outputs of `call`."""
        self.measures.update(outputs[0], batch["labels"])

    def test_measures(self) -> dict[str, Tensor]:
        """Return measures of the trained parameters, name -> values_S, logged after a test."""
        return {}

    def on_validation_epoch_start(self) -> None:
        """Log the accuracy of the last training step, over all ranks; no further forward is needed."""
        if (
            self.trainer.state.fn == TrainerFn.FITTING
            and (step := self.last_step.measures(self.trainer.strategy)) is not None
        ):
            self.log_members({"train/accuracy": step["accuracy"].to(self.device)})
            self.members["train/loss"] = step["loss"]

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add what the validation after this step reports of the step; a resumed run may begin with that validation."""
        checkpoint["last_step"] = self.last_step.measures(self.trainer.strategy)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what a checkpoint says of its last training step."""
        if step := checkpoint.get("last_step"):
            self.last_step.resumed = {name: step[name].float() for name in ("accuracy", "loss")}

    def validation_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Measure a held-out batch."""
        self.update_measures(self.call(batch["tokens"], batch["labels"]), batch)

    def test_step(self, batch: TokenBatch, batch_idx: int) -> None:
        """Measure a test batch, and keep an input to draw."""
        self.validation_step(batch, batch_idx)
        self._shown = batch["tokens"][:1]

    def on_validation_epoch_end(self) -> None:
        """Log the measures."""
        self._log_measures("validation")

    def on_test_epoch_end(self) -> None:
        """Log the measures and the bounds of the task, and draw the attention of one input."""
        if self._shown is not None and self.trainer.loggers and not is_dry_run(self.trainer):
            # Here and not in a step, in which a clamp has the labels of a whole batch
            draw_attention(self, self._shown, self._token_text)
        self._log_measures("test")
        self.log_members({f"test/{name}": values_S for name, values_S in self.test_measures().items()})
        if isinstance(data := self._data, HasBounds):
            bounds = {"test/chance": data.chance, "test/ceiling": data.ceiling}
            known = {name: bound for name, bound in bounds.items() if bound is not None}
            self.log_members({name: torch.full([self.ensemble], x, device=self.device) for name, x in known.items()})

    def predict_step(self, batch: TokenBatch, batch_idx: int) -> dict[str, Tensor]:
        """Write logits, probabilities and attention of the inputs into `predictions/` of the run's folder."""
        return predict(self, batch, batch_idx, self._token_text)

    def _log_measures(self, stage: Split) -> None:
        values, hits, count = self.measures.compute()
        if isinstance(data := main_task(self._data), HasCharacters):
            values["bits_per_character"] = values["loss"] / math.log(2) * data.tokens_per_character(stage)
        self.log_members({f"{stage}/{name}": values_S for name, values_S in values.items()})
        for name, hits_S in hits.items():
            record_proportion(self, f"{stage}/{name}", hits_S, int(count))
        self.measures.reset()

    @property
    def _data(self) -> object:
        return connected(self.trainer).datamodule

    def _token_text(self, token: int) -> str:
        task = main_task(self._data)
        if isinstance(task, HasVocabulary) and token >= task.vocab_size:
            return f"<{token}>"  # a model may have more tokens than its data
        return self._data.token_text(token) if isinstance(self._data, SupportsTokenText) else str(token)
