"""`last.ckpt` is the model as training left it, and going on from it is going on."""

from pathlib import Path

import pytest
import torch
from lightning import Trainer

from callbacks import LastCheckpoint
from datamodules import ModularArithmetic
from lightning_modules import Separability

SIZES = {"vocab_size": 12, "seq_len": 3, "width": 8, "heads": 2, "schedule": "constant", "seed": 0}


def fit(folder: Path, steps: int, **options) -> Separability:
    module = Separability(**SIZES)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        max_steps=steps,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        callbacks=[LastCheckpoint()],
        default_root_dir=folder,
        accelerator="cpu",
        **quiet,
    )
    trainer.fit(module, datamodule=ModularArithmetic(p=11, batch_size=12, seed=0), **options)
    return module


@pytest.mark.parametrize("steps", [3, 4, 6], ids=["before any validation", "at a validation", "after one"])
def test_it_holds_the_last_step(tmp_path, steps):
    module = fit(tmp_path, steps)
    files = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert len(files) == 2
    assert files[1] == "last.ckpt"
    for name in files:
        held = torch.load(tmp_path / "checkpoints" / name, weights_only=True)
        assert held["global_step"] == steps
        assert all(torch.equal(value, held["state_dict"][key]) for key, value in module.state_dict().items())


def test_a_run_that_goes_on_from_it_is_the_run_that_never_stopped(tmp_path):
    whole = fit(tmp_path / "whole", 11)
    fit(tmp_path / "first", 6)
    resumed = fit(tmp_path / "resumed", 11, ckpt_path=tmp_path / "first" / "checkpoints" / "last.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
