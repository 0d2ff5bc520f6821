"""The record of a run: its content after success and after failures."""

import json
import math
from importlib import metadata
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringDataModule, BoringModel
from toy_run import RecordedModel, Stop, make_trainer

from callbacks import StabilityMonitor
from callbacks.run_record import RunRecord
from datamodules import InterleavedStreams
from lightning_modules.separability import Separability


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


def test_a_fit_before_a_test_is_not_the_end_of_the_run(tmp_path, monkeypatch):
    ends = []
    monkeypatch.setattr("callbacks.run_record.log_end", ends.append)
    record = RunRecord(config={"x": 1})
    record.test_follows = True
    trainer, model = make_trainer(tmp_path, record), RecordedModel()
    assert not record.trained
    trainer.fit(model)
    assert (record.trained, ends) == (True, [])
    assert (read(tmp_path)["status"], read(tmp_path)["metrics"]["train/loss"]) == ("running", 2.0)
    trainer.test(model, verbose=False)
    assert (read(tmp_path)["status"], ends) == ("finished", [trainer])


def test_the_table_leaves_out_an_unknown_interval(tmp_path):
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
    assert after_test["hits"] == {"test/accuracy": [500]}


def test_a_module_without_counts_has_none_in_the_record(tmp_path):
    trainer = make_trainer(tmp_path, RunRecord())
    trainer.fit(BoringModel())
    assert [read(tmp_path)[key] for key in ("n", "hits", "intervals")] == [{}, {}, {}]


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
    members = record["members"]
    assert {"test/accuracy", "test/loss", "test/a_act", "validation/accuracy", "train/loss"} <= set(members)
    assert all(len(values) == 3 for values in members.values())
    for name, values in members.items():
        if None not in values:
            assert record["metrics"][name] == pytest.approx(sum(values) / 3, rel=1e-5), name
    assert len(set(members["test/loss"])) == 3
    assert members["test/loss"] == pytest.approx(model.members["test/loss"].tolist(), rel=1e-5)


def test_a_member_without_a_value_is_null(ensemble):
    *_, record = ensemble
    assert record["members"]["stability/reached_step"] == [None] * 3
    assert record["members"]["stability/stable"] == [0, 0, 0]


def test_every_validation_writes_a_line_with_the_members(ensemble):
    folder, _, record = ensemble
    lines = [json.loads(line) for line in (folder / "members.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]  # neither the sanity check nor the test has a line
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


def test_nan_and_infinity_become_null(finished):
    *_, record = finished
    assert record["metrics"]["test/undefined"] is None
    assert record["metrics"]["test/unbounded"] is None


def test_versions_and_hardware_are_recorded(finished):
    *_, record = finished
    assert record["versions"]["torch"] == metadata.version("torch")  # torch.__version__ may add "+cu130"
    assert record["hardware"]["device"].startswith("cpu")
    assert record["hardware"]["count"] == record["hardware"]["world_size"] == 1
    assert record["hardware"]["precision"] == "32-true"


def test_the_config_is_logged_as_hyperparameters_and_no_temporary_file_stays(finished):
    folder, *_ = finished
    assert "width: 2" in (folder / "hparams.yaml").read_text()
    assert not list(folder.glob("*.tmp"))


@pytest.mark.parametrize(
    ("exception", "raised", "status"),
    [(RuntimeError, RuntimeError, "failed"), (KeyboardInterrupt, SystemExit, "interrupted")],
    ids=["failed", "interrupted"],
)
@pytest.mark.parametrize("stage", ["fit", "test"])
def test_a_run_that_ends_early_keeps_its_metrics(tmp_path, exception, raised, status, stage):
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
            seen.append(read(tmp_path)["status"])

        on_test_start = on_train_start

    seen, trainer = [], make_trainer(tmp_path, RunRecord(), Look())
    trainer.fit(RecordedModel())
    trainer.test(RecordedModel(), verbose=False)
    assert seen == ["running", "running"]


def test_a_fast_dev_run_writes_no_record(tmp_path):
    make_trainer(tmp_path, RunRecord(), fast_dev_run=True).fit(RecordedModel())
    assert not (tmp_path / "results.json").exists()


def test_a_resumed_record_goes_on_and_a_test_begins_a_new_one(tmp_path):
    class Save(Callback):
        def on_train_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "a.ckpt")

    make_trainer(tmp_path / "first", RunRecord(config={"x": 1}), Save()).fit(RecordedModel())
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert content["config"] == {"x": 1}
    state = content["callbacks"]["RunRecord"]
    assert state["metrics"]["train/loss"] == 2.0
    assert state["seconds"] > 0
    state |= {"seconds": 1000.0, "metrics": {"train/loss": 7.0, "old": 1.0}, "hits": {"old": [3]}}
    state |= {"members": {"old": [1.0, None]}}
    torch.save(content, tmp_path / "a.ckpt")
    on = make_trainer(tmp_path / "on", resumed := RunRecord(), max_steps=5)
    resumed._started -= 5000  # made long before the fit
    on.fit(RecordedModel(), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    record = read(tmp_path / "on")
    assert 1000 < record["seconds"]["fit"] < 1100
    assert record["metrics"] | {"train/loss": 2.0, "old": 1.0} == record["metrics"]
    assert (record["hits"]["old"], record["members"]["old"]) == ([3], [1.0, None])
    resumed.on_save_checkpoint(on, on.lightning_module, later := {"callbacks": {}})
    assert later["callbacks"]["RunRecord"]["members"] == {"old": [1.0, None]}
    on.test(RecordedModel(), verbose=False)
    assert read(tmp_path / "on")["seconds"]["test"] < 100
    tested = make_trainer(tmp_path / "test", RunRecord())
    tested.test(RecordedModel(), ckpt_path=tmp_path / "a.ckpt", weights_only=True, verbose=False)
    assert "old" not in read(tmp_path / "test")["metrics"]
    torch.save(content | {"callbacks": {}}, tmp_path / "a.ckpt")  # of a run without a record
    make_trainer(tmp_path / "new", RunRecord(), max_steps=4).fit(RecordedModel(), ckpt_path=tmp_path / "a.ckpt")
    assert read(tmp_path / "new")["seconds"]["fit"] < 100


def test_the_table_has_four_digits_and_no_ends_of_intervals():
    record = RunRecord()
    record.record["metrics"] = {"test/accuracy": 0.512345, "loss": None, "x_low": 1.0, "x_high": 2.0}
    record.record["intervals"] = {"test/accuracy": [0.4, 0.612345]}
    record.record["n"] = {"test/accuracy": 1000}
    assert record.table().splitlines() == [
        "metric          value  95 % interval     n",
        "-" * 42,
        "test/accuracy  0.5123  0.4 to 0.6123  1000",
        "loss                -                     ",
    ]


def test_a_fault_before_the_first_stage_and_an_end_at_once_are_recorded(tmp_path):
    class Faulty(BoringDataModule):
        def setup(self, stage):
            raise RuntimeError

    record = RunRecord()
    with pytest.raises(RuntimeError):
        make_trainer(tmp_path, record).fit(RecordedModel(), Faulty())
    assert (read(tmp_path)["status"], read(tmp_path)["steps"]) == ("failed", 0)
    assert "revision" in read(tmp_path)["git"]
    record.end("interrupted")
    assert read(tmp_path)["status"] == "interrupted"
