"""Flags of the trainer that turn off what a run has otherwise."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from toy_cli import BASE

import main


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs `main` with a config that logs and has callbacks that need a logger."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["main.py"])
    callbacks = [
        {"class_path": "LearningRateMonitor"},
        {"class_path": "ModelCheckpoint"},
        *BASE["trainer"]["callbacks"],
    ]
    trainer = BASE["trainer"] | {"callbacks": callbacks, "log_every_n_steps": 5, "num_sanity_val_steps": 2}
    trainer |= {"enable_progress_bar": None, "enable_model_summary": None}
    Path("base.yaml").write_text(yaml.safe_dump(BASE | {"trainer": trainer}))
    return lambda command, *args: main.main([command, "--config", "base.yaml", *args])


def test_a_barebones_run_trains_and_writes_its_record_alone(run):
    with pytest.warns(UserWarning, match="which are left out: LearningRateMonitor, ModelCheckpoint$"):
        done = run("fit", "--trainer.barebones", "true")
    assert done.trainer.global_step == 2
    assert "CliWatcher" in {type(callback).__name__ for callback in done.trainer.callbacks}
    assert sorted(file.name for file in done.run_dir.iterdir()) == ["config.yaml", "results.json"]
    record = json.loads((done.run_dir / "results.json").read_text())
    assert record["status"] == "finished"
    assert [*record["seconds"]] == ["fit"]


def test_a_run_without_a_logger_leaves_out_what_logs(run):
    with pytest.warns(UserWarning, match="trainer.logger false turns off .* are left out: LearningRateMonitor$"):
        done = run("fit", "--trainer.logger", "false")
    assert {"CliWatcher", "ModelCheckpoint"} <= {type(callback).__name__ for callback in done.trainer.callbacks}
    assert json.loads((done.run_dir / "results.json").read_text())["status"] == "finished"


@pytest.mark.parametrize(
    ("command", "option", "said"),
    [
        ("fit", "--trainer.logger=true", "trainer.barebones turns off trainer.logger: leave one of the two out"),
        ("fit", "--trainer.fast_dev_run=2", "trainer.barebones turns off trainer.fast_dev_run"),
        ("test", "--trainer.limit_test_batches=1", "trainer.barebones turns off all measures, and test would give"),
    ],
)
def test_what_a_barebones_run_cannot_have(run, capsys, command, option, said):
    with pytest.raises(SystemExit):
        run(command, "--trainer.barebones=true", option)
    assert f"error: {said}" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "flag"), [("validate", "val"), ("test", "test"), ("predict", "predict")])
def test_a_command_without_batches_is_refused(run, capsys, command, flag):
    with pytest.raises(SystemExit) as ended:
        run(command, f"--trainer.limit_{flag}_batches", "0")
    assert ended.value.code == 2
    assert f"trainer.limit_{flag}_batches must not be 0: nothing would be" in capsys.readouterr().err
    assert not Path("runs").exists()
