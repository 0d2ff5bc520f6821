"""`last.ckpt` is the model after the last step, and a run that resumes from it continues the first run."""

from pathlib import Path

import pytest
import torch
from lightning import Callback, Trainer

from callbacks import LastCheckpoint, StabilityMonitor
from datamodules import ModularArithmetic
from lightning_modules.separability import Separability

SIZES = {"vocab_size": 12, "seq_len": 3, "width": 8, "heads": 2, "schedule": "constant", "seed": 0}


def fit(folder: Path, steps: int, callbacks=(), checkpoint=None, min_steps=None, **options) -> Separability:
    module = Separability(**SIZES)
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    trainer = Trainer(
        max_steps=steps,
        val_check_interval=4,
        check_val_every_n_epoch=None,
        min_steps=min_steps,
        callbacks=[*callbacks, checkpoint or LastCheckpoint()],
        default_root_dir=folder,
        accelerator="cpu",
        **quiet,
    )
    trainer.fit(module, datamodule=ModularArithmetic(p=11, batch_size=12, seed=0), **options)
    return module


@pytest.mark.parametrize("steps", [3, 4, 6], ids=["before any validation", "at a validation", "after one"])
def test_it_has_the_last_step(tmp_path, steps):
    module = fit(tmp_path, steps)
    files = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert len(files) == 2
    assert files[1] == "last.ckpt"
    for name in files:
        held = torch.load(tmp_path / "checkpoints" / name, weights_only=True)
        assert held["global_step"] == steps
        assert all(torch.equal(value, held["state_dict"][key]) for key, value in module.state_dict().items())


def test_it_has_the_state_of_callbacks_after_the_last_validation(tmp_path):
    monitor = StabilityMonitor(reached=0.0, collapsed=0.0)
    fit(tmp_path, 4, callbacks=[monitor])
    held = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["callbacks"]["StabilityMonitor"]
    assert held["reached_step_S"].item() == 4
    assert held["up_S"].item()


def test_a_stop_before_min_steps_saves_nothing(tmp_path):
    class Stop(Callback):
        def on_train_batch_end(self, trainer, *args):
            trainer.should_stop = True

    saved = []

    class Count(LastCheckpoint):
        def _save_last_checkpoint(self, trainer, candidates):
            saved.append(trainer.global_step)
            super()._save_last_checkpoint(trainer, candidates)

    fit(tmp_path, 9, checkpoint=Count(), callbacks=[Stop()], min_steps=6)
    assert saved
    assert min(saved) >= 4  # the first validation
    assert len([step for step in saved if step < 6]) <= 1


def test_a_resumed_run_equals_the_uninterrupted_run(tmp_path):
    whole = fit(tmp_path / "whole", 11)
    fit(tmp_path / "first", 6)
    resumed = fit(tmp_path / "resumed", 11, ckpt_path=tmp_path / "first" / "checkpoints" / "last.ckpt")
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
