"""A small model, its data and a callback whose runs take no time, for tests of the command line."""

from typing import Literal

import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel

from datamodules.errors import UserError


class CliHead(torch.nn.Module):
    def __init__(self, soft_tokens: int = 2):
        super().__init__()


class CliModel(BoringModel):
    def __init__(
        self,
        width: int = 2,
        output: str = "rms",
        layers: int | list[int] = 1,
        losses: dict[Literal["mean", "sum"], float | dict[str, float]] | None = None,
        head: CliHead | None = None,
        optimizer: OptimizerCallable = torch.optim.SGD,
    ):
        super().__init__()
        if width == -7:
            raise KeyboardInterrupt
        if width < 1:
            raise UserError("width: expected at least 1")
        self.save_hyperparameters(ignore=["head", "optimizer"])
        self.layer = torch.nn.Linear(32, width)
        self.optimizer = optimizer

    def configure_optimizers(self):
        return self.optimizer(self.parameters())

    def test_step(self, batch, batch_idx):
        self.log("test/accuracy", 0.5)


class CliData(BoringDataModule):
    def __init__(self, source: str = "generated", fault: str = ""):
        super().__init__()
        self.fault = fault
        self.source = source

    def setup(self, stage: str) -> None:
        super().setup(stage)
        if self.fault == "user":
            raise UserError("data.fault: expected nothing")
        if self.fault == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity")
        if self.fault == "bug":
            int("not a number")


class CliWatcher(Callback):
    def __init__(self, every_n_steps: int = 1):
        pass


BASE = {
    "model": {"class_path": "CliModel"},
    "data": {"class_path": "CliData"},
    "trainer": {
        "accelerator": "cpu",
        "max_steps": 2,
        "limit_val_batches": 1,
        "limit_test_batches": 1,
        "enable_model_summary": False,
        "enable_progress_bar": False,
        "callbacks": [{"class_path": "CliWatcher"}],
    },
}
