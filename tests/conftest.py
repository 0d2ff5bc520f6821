"""Fixtures of the telepathy line and of the command line."""

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from lightning import Trainer

import main
from cli.app import CrosstalkCLI
from datamodules import WordProblems
from datamodules.problems import Problem, generate
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.telepathy import Telepathy, TokenBridge

if TYPE_CHECKING:
    from faults.zygote import Zygote

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # one process per core: more threads would wait for one another

# Flags of a trainer that writes nothing
QUIET = dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"), False)
ROOT = Path(__file__).parents[1]
SMALL = {"batch_size": 8, "epoch_size": 800, "validation_size": 16, "eval_batch_size": 16, "test_sets": {"test": 16}}


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Use two processes for the whole suite; none for single files, where their start takes longer than the tests."""
    return 2 if config.args == config.getini("testpaths") else 0


@pytest.fixture(autouse=True)
def draws() -> None:
    """Give each test the same random numbers, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def workplace(tmp_path, monkeypatch) -> Path:
    """Change to a folder with copies of the assets and configs, so that a run cannot damage the originals."""
    for name in ("assets", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    return tmp_path


@pytest.fixture
def run(workplace) -> Callable[..., CrosstalkCLI]:
    """Return a function that runs `main` on a config with sizes that a CPU finishes in seconds."""
    sizes = {"data.batch_size": 8, "data.validation_size": 16, "data.eval_batch_size": 16, "data.test_sets.test": 16}
    sizes |= {"model.max_new_tokens": 8, "trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false"}
    small = [text for key, value in sizes.items() for text in (f"--{key}", str(value))]

    def call(command: str, config: str, *args: object) -> CrosstalkCLI:
        return main.main([command, "--config", f"configs/{config}.yaml", *small, *map(str, args)])

    return call


@pytest.fixture(scope="session")
def telepathy() -> Callable[..., Telepathy]:
    """Return a function that makes a module over the embedded pair, with the same weights each time."""

    def make(bridge: Callable | None = None, source_layer: int | list[int] = 1, **options) -> Telepathy:
        pair = (Pretrained(str(ROOT / "assets" / "pair" / which)) for which in ("source", "target"))
        torch.manual_seed(0)
        bridge = bridge or partial(TokenBridge, hidden=64)
        return Telepathy(*pair, bridge, source_layer, **{"warmup_steps": 2, "max_new_tokens": 100} | options)

    return make


@pytest.fixture(scope="session")
def problems() -> list[Problem]:
    """Return sixteen questions of different lengths."""
    return [generate(7, "train", index) for index in range(16)]


@pytest.fixture
def fit(tmp_path) -> Callable[..., Trainer]:
    """Return a function that trains a module on word problems, writes nothing, and returns the trainer."""

    def train(module: Telepathy, steps: int, data: WordProblems | None = None, **options) -> Trainer:
        quiet = QUIET | {"accelerator": "cpu", "default_root_dir": tmp_path, "limit_val_batches": 0, "max_steps": steps}
        trainer = Trainer(**quiet | options)
        trainer.fit(module, datamodule=data or WordProblems(**SMALL))
        return trainer

    return train


@pytest.fixture(scope="session")
def zygote() -> Iterator["Zygote"]:
    """Return an interpreter that has imported the program and forks the processes of runs."""
    from faults.zygote import Zygote

    made = Zygote()
    yield made
    made.close()
