"""Two processes compute what one process computes with the batches of both."""

import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import main

STEPS, BATCH = 4, 16
TEST = ["--data.test_sets", '{"test": 33, "twin": 14}', "--model.max_new_tokens", "60"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ddp")
    for name in ("assets", "configs"):
        shutil.copytree(ROOT / name, folder / name)
    return folder


@pytest.fixture(scope="module")
def launch(folder):
    """Return a function that runs a command line on one process, or as a program on two with the same global batch."""

    def call(command: str, where: str, processes: int, *args: object) -> Path:
        sizes = {"data.batch_size": BATCH // processes, "data.validation_size": 32, "trainer.max_steps": STEPS}
        sizes |= {"data.eval_batch_size": BATCH // processes, "trainer.log_every_n_steps": 1, "data.epoch_size": 160}
        sizes |= {"trainer.val_check_interval": STEPS, "model.warmup_steps": 1, "trainer.devices": processes}
        sizes |= {"trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false", "model.bridge.soft_tokens": 9}
        sizes |= {"trainer.strategy": "ddp"} if processes > 1 else {}
        options = [text for key, value in sizes.items() for text in (f"--{key}", str(value))]
        options += [*map(str, args), "--trainer.default_root_dir", where]
        run(folder, [command, "--config", "configs/telepathy_v15.yaml", *options], processes)
        return folder / where

    return call


def run(folder: Path, line: list[str], processes: int) -> None:
    if processes == 1:
        with contextlib.chdir(folder):
            return main.main(line)
    local = {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "TOKENIZERS_PARALLELISM": "false"}
    others = {name: value for name, value in os.environ.items() if not name.startswith(("CROSSTALK", "PL_"))}
    program = [sys.executable, str(ROOT / "main.py"), *line]
    done = subprocess.run(program, cwd=folder, env=others | local, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    (folder / "stderr.txt").write_text(done.stderr)


def series(folder: Path, name: str) -> list[float]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return [event.value for event in events.Scalars(name)]


@pytest.fixture(scope="module")
def two(launch) -> Path:
    return launch("fit", "two", 2, *TEST)


def test_objectives_over_the_batch_are_the_same_on_two_processes(launch):
    weights = dict.fromkeys(["contrastive", "anchor", "separation", "position_variance"], 0.1) | {"batch_diversity": 1}
    diverse = ["--model.objectives", json.dumps(weights), "--test_after_fit", "false"]
    alone, shared = launch("fit", "alone", 1, *diverse), launch("fit", "shared", 2, *diverse)
    for name in ("train/loss", *(f"train/{objective}" for objective in weights)):
        assert series(shared, name) == pytest.approx(series(alone, name), abs=1e-5)
        assert len(set(series(alone, name))) == STEPS
    assert series(shared, "validation/loss") == pytest.approx(series(alone, "validation/loss"), rel=1e-3)


def test_the_loss_of_the_answers_is_the_same_on_two_processes(launch, two):
    one = launch("fit", "one", 1, "--test_after_fit", "false")
    assert series(two, "validation/loss") == pytest.approx(series(one, "validation/loss"), rel=1e-3)
    assert series(two, "train/loss") == pytest.approx(series(one, "train/loss"), rel=1e-4)


def test_frozen_models_that_are_split_give_the_same_losses(launch, two, folder):
    callbacks = "trainer: {callbacks: [{class_path: QuickEval, init_args: {every_n_steps: 2, n_samples: 6}}]}"
    (folder / "split.yaml").write_text(callbacks)
    configs = ["--config", "configs/presets/fsdp.yaml", "--config", "split.yaml"]
    flags = ["--trainer.devices", "2", "--trainer.precision", "32-true"]
    split = launch("fit", "split", 2, *configs, *flags, *TEST)
    said = (folder / "stderr.txt").read_text()
    assert re.findall(r"split over 2 processes: (\S+) of (\S+) M parameters each", said) == [
        ("0.23", "0.459"),
        ("0.246", "0.492"),
    ]
    assert len(series(split, "quick_eval/accuracy")) == STEPS // 2
    assert series(split, "train/loss") == pytest.approx(series(two, "train/loss"), abs=1e-5)
    assert series(split, "validation/loss") == pytest.approx(series(two, "validation/loss"), rel=1e-5)
    states = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"] for run in (two, split)]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, atol=1e-5, rtol=1e-4)


def test_a_checkpoint_has_the_same_measures_on_two_processes(launch, two):
    one = launch("test", "tested", 1, *TEST, "--ckpt_path", two / "checkpoints" / "last.ckpt")
    records = [json.loads((folder / "results.json").read_text()) for folder in (one, two)]
    expected, found = ({k: v for k, v in r["metrics"].items() if k.split("/")[0] in ("test", "twin")} for r in records)
    assert set(found) == set(expected)
    for name, value in expected.items():
        if not name.endswith("_ms"):
            assert found[name] == pytest.approx(value, rel=1e-5, abs=1e-5), name
    for name, value in records[0]["n"].items():
        assert records[1]["n"][name] == value
    for name in ("test", "twin"):
        lines = [(folder / "samples" / f"{name}.jsonl").read_text().splitlines() for folder in (one, two)]
        assert sorted(lines[0]) == sorted(lines[1])
    for name in ("test/accuracy", "twin/twin_consistency"):
        assert records[0]["intervals"][name] == pytest.approx(records[1]["intervals"][name])


def test_members_have_the_same_measures_on_two_processes(folder):
    sizes = {"model.vocab_size": 31, "data.vocab_size": 31, "model.seq_len": 12, "data.seq_len": 12, "model.width": 16}
    sizes |= {"model.heads": 2, "model.ensemble": 2, "model.warmup_steps": 1, "data.validation_size": 16}
    sizes |= {"data.test_size": 16, "trainer.max_steps": STEPS, "trainer.val_check_interval": STEPS}
    sizes |= {"trainer.accelerator": "cpu", "trainer.enable_progress_bar": "false"}
    members = []
    for processes in (1, 2):
        shares = {"data.batch_size": BATCH // processes, "data.eval_batch_size": 8 // processes}
        shares |= {"trainer.devices": processes, "trainer.default_root_dir": f"members_{processes}"}
        shares |= {"trainer.strategy": "ddp"} if processes > 1 else {}
        options = [text for key, value in (sizes | shares).items() for text in (f"--{key}", str(value))]
        run(folder, ["fit", "--config", "configs/separability_interleaved.yaml", *options], processes)
        members.append(json.loads((folder / f"members_{processes}" / "results.json").read_text())["members"])
    alone, shared = members
    assert set(shared) == set(alone)
    assert {"train/accuracy", "train/loss", "test/accuracy", "test/sigma2", "test/ceiling"} <= set(alone)
    for name, values in alone.items():
        assert shared[name] == pytest.approx(values, rel=1e-3, abs=1e-5), name
    assert len(set(alone["train/loss"])) == 2
