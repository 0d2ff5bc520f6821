"""A module with a record of its counts, a callback that ends a run early, and a trainer for them."""

import math
from pathlib import Path

import torch
from conftest import QUIET
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks.run_record import RunRecord


class RecordedModel(BoringModel):
    def __init__(self):
        super().__init__()
        self.intervals = {"test/accuracy": (0.25, 0.75)}
        self.counts = {"test/accuracy": 1000}
        self.hits = {"test/accuracy": [500]}

    def training_step(self, batch, batch_idx):
        self.log("train/loss", 2.0)
        return super().training_step(batch, batch_idx)

    def test_step(self, batch, batch_idx):
        self.log("test/accuracy", 0.5)
        self.log("test/undefined", torch.tensor(math.nan))
        self.log("test/unbounded", torch.tensor(math.inf))


class Stop(Callback):
    """Ends the chosen stage with an exception."""

    def __init__(self, stage: str, exception: type[BaseException]):
        self.stage = stage
        self.exception = exception

    def on_train_batch_end(self, *args):
        if self.stage == "fit":
            raise self.exception

    def on_test_batch_start(self, *args):
        if self.stage == "test":
            raise self.exception


def make_trainer(folder: Path, record: RunRecord, *others: Callback, **options) -> Trainer:
    limits = {"max_steps": 3, "limit_val_batches": 1, "limit_test_batches": 1, "log_every_n_steps": 1}
    outputs = {
        "default_root_dir": folder,
        "logger": TensorBoardLogger(folder, name="", version=""),
        "accelerator": "cpu",
    }
    return Trainer(callbacks=[record, *others], **QUIET | outputs | limits | options)
