"""The record of a run: its content, at the end and amid failures."""

import json
import math
import os
import subprocess
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger

from callbacks import StabilityMonitor
from callbacks.run_record import RunRecord, git_state, make_run_dir
from datamodules import InterleavedStreams
from lightning_modules.separability import Separability


class RecordedModel(BoringModel):
    def __init__(self):
        super().__init__()
        self.intervals = {"test/accuracy": (0.25, 0.75)}
        self.counts = {"test/accuracy": 1000}

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
    logger = TensorBoardLogger(folder, name="", version="")
    silent = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    limits = {"max_steps": 3, "limit_val_batches": 1, "limit_test_batches": 1, "log_every_n_steps": 1}
    everything = {"default_root_dir": folder, "logger": logger, "accelerator": "cpu"} | silent | limits | options
    return Trainer(callbacks=[record, *others], **everything)


def read(folder: Path) -> dict:
    def refuse(constant: str):
        raise AssertionError(f"{constant} is not JSON")

    return json.loads((folder / "results.json").read_text(), parse_constant=refuse)


@pytest.fixture
def finished(tmp_path):
    record = RunRecord(["fit", "--config", "a.yaml"], ["a.yaml"], {"model": {"width": 2}, "layers": [1, 2]})
    trainer = make_trainer(tmp_path, record)
    model = RecordedModel()
    trainer.fit(model)
    after_fit = read(tmp_path)
    trainer.test(model, verbose=False)
    return tmp_path, after_fit, read(tmp_path)


def test_a_fit_that_a_test_follows_is_not_the_runs_end(tmp_path):
    record = RunRecord()
    record.test_follows = True
    trainer, model = make_trainer(tmp_path, record), RecordedModel()
    trainer.fit(model)
    assert (read(tmp_path)["status"], read(tmp_path)["metrics"]["train/loss"]) == ("running", 2.0)
    trainer.test(model, verbose=False)
    assert read(tmp_path)["status"] == "finished"


def test_an_interval_that_is_not_known_is_left_out_of_the_table(tmp_path):
    record, model = RunRecord(), RecordedModel()
    model.intervals = {"test/accuracy": (math.nan, math.nan)}
    make_trainer(tmp_path, record).test(model, verbose=False)
    assert read(tmp_path)["intervals"]["test/accuracy"] == [None, None]
    (line,) = (line for line in record.table().splitlines() if line.startswith("test/accuracy"))
    assert line.split() == ["test/accuracy", "0.5", "1000"]


def test_both_stages_are_in_one_record(finished):
    _, after_fit, after_test = finished
    assert after_fit["status"] == after_test["status"] == "finished"
    assert set(after_fit["seconds"]) == {"fit"}
    assert set(after_test["seconds"]) == {"fit", "test"}
    assert all(seconds > 0 for seconds in after_test["seconds"].values())
    assert after_test["steps"] == 3
    assert after_test["command"] == ["fit", "--config", "a.yaml"]
    assert after_test["configs"] == ["a.yaml"]
    assert after_test["metrics"]["train/loss"] == 2.0
    assert after_test["metrics"]["test/accuracy"] == 0.5
    assert after_test["intervals"] == {"test/accuracy": [0.25, 0.75]}
    assert after_test["n"] == {"test/accuracy": 1000}


def streams(ensemble: int) -> tuple[Separability, InterleavedStreams]:
    sizes = {"batch_size": 4, "eval_batch_size": 8, "validation_size": 8, "test_size": 8}
    model = Separability(vocab_size=31, seq_len=12, width=16, heads=2, warmup_steps=1, ensemble=ensemble)
    return model, InterleavedStreams(vocab_size=31, seq_len=12, **sizes)


@pytest.fixture
def ensemble(tmp_path):
    model, data = streams(3)
    never = StabilityMonitor(reached=1.0)
    trainer = make_trainer(tmp_path, RunRecord(), never, max_steps=6, val_check_interval=2, num_sanity_val_steps=1)
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    return tmp_path, model, read(tmp_path)


def test_an_ensembles_metrics_are_the_means_over_its_members(ensemble):
    _, model, record = ensemble
    given = record["members"]
    assert {"test/accuracy", "test/loss", "test/a_act", "validation/accuracy", "train/loss"} <= set(given)
    assert all(len(values) == 3 for values in given.values())
    for name, values in given.items():
        if None not in values:
            assert record["metrics"][name] == pytest.approx(sum(values) / 3, rel=1e-5), name
    assert len(set(given["test/loss"])) == 3
    assert given["test/loss"] == pytest.approx(model.members["test/loss"].tolist(), rel=1e-5)


def test_a_member_without_a_value_is_null(ensemble):
    *_, record = ensemble
    assert record["members"]["stability/reached_step"] == [None] * 3
    assert record["members"]["stability/stable"] == [0, 0, 0]


def test_every_validation_leaves_a_line_on_the_members(ensemble):
    folder, _, record = ensemble
    lines = [json.loads(line) for line in (folder / "members.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]  # the sanity check is none, and neither is the test
    assert all(len(values) == 3 for line in lines for name, values in line.items() if name != "step")
    assert len({tuple(line["validation/loss"]) for line in lines}) == 3
    assert lines[-1]["validation/loss"] == record["members"]["validation/loss"]


def test_an_ordinary_run_has_no_members(tmp_path):
    model, data = streams(1)
    trainer = make_trainer(tmp_path, RunRecord())
    trainer.fit(model, data)
    trainer.test(model, data, verbose=False)
    assert "members" not in read(tmp_path)
    assert not (tmp_path / "members.jsonl").exists()


def test_what_is_not_finite_becomes_null(finished):
    *_, record = finished
    assert record["metrics"]["test/undefined"] is None
    assert record["metrics"]["test/unbounded"] is None


def test_where_it_ran_is_recorded(finished):
    *_, record = finished
    assert record["versions"]["torch"] == torch.__version__
    assert record["hardware"]["device"].startswith("cpu")
    assert record["hardware"]["count"] == record["hardware"]["world_size"] == 1
    assert record["hardware"]["precision"] == "32-true"


def test_the_config_is_logged_as_hyperparameters_and_no_draft_is_left(finished):
    folder, *_ = finished
    assert "width: 2" in (folder / "hparams.yaml").read_text()
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    ("exception", "raised", "status"),
    [(RuntimeError, RuntimeError, "failed"), (KeyboardInterrupt, SystemExit, "interrupted")],
    ids=["failed", "interrupted"],
)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_run_that_ends_early_keeps_what_it_reached(tmp_path, exception, raised, status, stage):
    trainer = make_trainer(tmp_path, RunRecord(), Stop(stage, exception))
    model = RecordedModel()
    if stage == "test":
        trainer.fit(model)
    with pytest.raises(raised):
        getattr(trainer, stage)(model)
    record = read(tmp_path)
    assert record["status"] == status
    assert stage in record["seconds"]
    assert ("train/loss" in record["metrics"]) == (stage == "test")


def test_the_record_says_running_while_it_runs(tmp_path):
    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            self.status = read(tmp_path)["status"]

    look = Look()
    make_trainer(tmp_path, RunRecord(), look).fit(RecordedModel())
    assert look.status == "running"


def test_a_fast_dev_run_writes_no_record(tmp_path):
    make_trainer(tmp_path, RunRecord(), fast_dev_run=True).fit(RecordedModel())
    assert not (tmp_path / "results.json").exists()


def git(folder: Path, *command: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", folder, *who, *command], check=True, capture_output=True)


def test_git_state_is_of_that_checkout_alone(tmp_path):
    inside = tmp_path / "site-packages"
    inside.mkdir()
    assert git_state(inside) == {"revision": None, "dirty": None}
    git(tmp_path, "init")
    git(tmp_path, "commit", "--allow-empty", "-m", "start")
    assert len(git_state(tmp_path)["revision"]) == 40
    assert git_state(tmp_path)["dirty"] is False
    (tmp_path / "new.py").touch()
    assert git_state(tmp_path)["dirty"] is True
    assert git_state(inside) == {"revision": None, "dirty": None}


def test_run_folders_never_coincide(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = [make_run_dir("configs/phase_mqar.yaml", "same") for _ in range(3)]
    assert len(set(folders)) == 3
    assert {folder.parent for folder in folders} == {Path("runs/phase_mqar")}
    assert make_run_dir(None, "same").parent == Path("runs/adhoc")
    assert folders[0].name.split("-")[2] != make_run_dir("configs/phase_mqar.yaml", "other").name.split("-")[2]
    (folders[0] / "results.json").touch()
    assert make_run_dir(os.path.join(folders[0], "config.yaml"), "same").parent == Path("runs/phase_mqar")
