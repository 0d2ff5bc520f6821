"""Short fits of a small transformer on modular arithmetic, which write their checkpoints into a folder."""

from pathlib import Path

import torch
from lightning import Callback, Trainer

from callbacks import LastCheckpoint
from cli.trainer import NoSignals
from datamodules import ModularArithmetic
from lightning_modules.separability import Separability

SIZES = {"vocab_size": 14, "seq_len": 3, "width": 8, "heads": 2, "schedule": "constant", "seed": 0}


class Stopped(Exception):
    """Stands for a kill."""


class StopAt(Callback):
    """Ends the run in a hook, at a step: files stay as they are then."""

    def __init__(self, hook: str, step: int) -> None:
        def stop(trainer: Trainer, *_: object, **__: object) -> None:
            if trainer.global_step == step and not trainer.sanity_checking:
                raise Stopped

        setattr(self, hook, stop)


def fit(folder: Path, steps: int, callbacks=(), checkpoint=None, make=Separability, **options):
    module, ckpt_path = make(**SIZES), options.pop("ckpt_path", None)
    torch.manual_seed(1 if ckpt_path else 0)  # a resumed run takes the random numbers from its checkpoint
    quiet = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    options = {"val_check_interval": 4, "check_val_every_n_epoch": None} | options
    trainer = Trainer(
        max_steps=steps,
        callbacks=[*callbacks, checkpoint or LastCheckpoint()],
        default_root_dir=folder,
        accelerator="cpu",
        **quiet,
        **options,
    )
    trainer._signal_connector = NoSignals(trainer)
    data = ModularArithmetic(p=13, batch_size=12, seed=0)  # four batches are a pass over the data
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return module


def held(folder: Path, name: str = "last") -> dict:
    return torch.load(folder / "checkpoints" / f"{name}.ckpt", weights_only=True)


def assert_same(first, second):
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name
