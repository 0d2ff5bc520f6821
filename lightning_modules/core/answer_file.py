"""`predict` of a module that generates answers: they go to a file."""

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import LightningModule

from lightning_modules.core.reporting import is_dry_run, run_folder
from lightning_modules.core.samples import EvalSample, gather_objects, write_jsonl


class WritesAnswers(LightningModule, ABC):
    """A module whose `predict` writes its answers to `samples/predictions.jsonl` in the folder of the run."""

    def __init__(self) -> None:
        super().__init__()
        self.predictions: list[EvalSample] = []

    @abstractmethod
    def sample_eval(self, batch: Any) -> list[EvalSample]:
        """Answer a batch."""

    def predict_step(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> list[EvalSample]:
        """Answer a batch."""
        samples = self.sample_eval(batch)
        self.predictions += samples
        return samples

    def on_predict_epoch_end(self) -> None:
        """Write question, answer and output of all ranks."""
        samples = [sample for part in gather_objects(self.predictions) for sample in part]
        folder, self.predictions = run_folder(self.trainer), []
        if self.trainer.is_global_zero and not is_dry_run(self.trainer):
            write_jsonl(folder / "samples" / "predictions.jsonl", samples)
