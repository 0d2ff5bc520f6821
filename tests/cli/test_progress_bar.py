"""The bar shows the losses, and no training step reads a number for it."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from lightning.pytorch.trainer.connectors.logger_connector import result

import main
from cli.progress_bar import LossBar
from datamodules import NeedleGym


@pytest.mark.parametrize("config", ["needle_gym", "separability_interleaved", "telepathy_v15"])
def test_steps_read_nothing_for_the_bar(workplace, config, monkeypatch, capfd):
    read = []
    convert = result.convert_tensors_to_scalars
    monkeypatch.setattr(result, "convert_tensors_to_scalars", lambda value: read.append(value) or convert(value))
    line = ["fit", "--config", f"configs/{config}.yaml", "--trainer.max_steps", "2"]
    line += ["--trainer.limit_val_batches", "0", "--test_after_fit", "false", "--trainer.callbacks", "[]"]
    main.main(line)
    assert not read
    assert "train/loss=" in capfd.readouterr().out


def test_the_bar_shows_what_callbacks_would_read():
    trainer = SimpleNamespace(
        callback_metrics={"train/loss": torch.tensor(0.5), "train/lm": torch.tensor(1.0)},
        loggers=[],
        progress_bar_metrics={"own": 2.0},
    )
    assert LossBar().get_metrics(trainer, None) == {"own": 2.0, "train/loss": 0.5}


@pytest.mark.parametrize(("device", "pinned"), [("cuda", True), ("cpu", False)])
def test_batches_for_a_gpu_lie_in_pinned_memory(device, pinned):
    data = NeedleGym()
    data.trainer = SimpleNamespace(
        strategy=SimpleNamespace(root_device=torch.device(device)),
        global_rank=0,
        world_size=1,
        overfit_batches=0,
        limit_train_batches=1.0,
        lightning_module=None,
    )
    assert data.train_dataloader().pin_memory is pinned


def test_no_module_has_lightning_read_its_measures_in_each_step():
    files = [file for part in ("lightning_modules", "callbacks") for file in Path(ROOT, part).rglob("*.py")]
    assert files
    assert not [file for file in files if "prog_bar=" in file.read_text()]
