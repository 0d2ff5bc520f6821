"""The record of a run: its content after success and after failures, and the settings in TensorBoard's HPARAMS tab."""

import json
import math
import os
import subprocess
from importlib import metadata
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.get_experiment import Handler as GetExperiment
from tensorboard.plugins.hparams.list_session_groups import Handler as ListSessionGroups

from callbacks import StabilityMonitor
from callbacks.hyperparameters import main_settings
from callbacks.provenance import git_state
from callbacks.run_record import RunRecord
from cli.run_folder import make_run_dir
from datamodules import InterleavedStreams
from lightning_modules.separability import Separability


class RecordedModel(BoringModel):
    def __init__(self):
        super().__init__()
        self.intervals = {"test/accuracy": (0.25, 0.75)}
        self.counts = {"test/accuracy": 1000}
        self.hits = {"test/accuracy": [500]}

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


def test_a_fit_before_a_test_is_not_the_end_of_the_run(tmp_path):
    record = RunRecord()
    record.test_follows = True
    trainer, model = make_trainer(tmp_path, record), RecordedModel()
    trainer.fit(model)
    assert (read(tmp_path)["status"], read(tmp_path)["metrics"]["train/loss"]) == ("running", 2.0)
    trainer.test(model, verbose=False)
    assert read(tmp_path)["status"] == "finished"


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


CONFIG = {
    "seed_everything": 7,
    "model": {
        "class_path": "lightning_modules.telepathy.Telepathy",
        "init_args": {
            "source": {"path": "assets/pair/source", "tokenizer": None},
            "source_layer": [1, 2],
            "compile": False,
            "bridge": {"class_path": "lightning_modules.telepathy.PerceiverBridge", "init_args": {"depth": 2}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01, "weight_decay": 0.1, "eps": 0}},
        },
    },
    "data": {
        "class_path": "datamodules.WordProblems",
        "init_args": {"batch_size": 16, "eval_batch_size": 250, "test_sets": {"test": 1000}},
    },
    "trainer": {
        "max_steps": 3,
        "precision": "32-true",
        "devices": 1,
        "callbacks": [{"class_path": "callbacks.QuickEval", "init_args": {"n_samples": 4}}],
    },
    "ckpt_path": None,
}
SETTINGS = {
    "seed": 7,
    "model": "Telepathy",
    "model.source.path": "assets/pair/source",
    "model.source_layer": "1, 2",
    "model.compile": False,
    "model.bridge": "PerceiverBridge",
    "model.bridge.depth": 2,
    "optimizer": "AdamW",
    "lr": 0.01,
    "weight_decay": 0.1,
    "data": "WordProblems",
    "batch_size": 16,
    "data.test_sets.test": 1000,
    "max_steps": 3,
    "precision": "32-true",
    "callbacks": "QuickEval",
}


def test_main_settings_are_flat_and_short():
    assert main_settings(CONFIG) == SETTINGS
    assert main_settings({}) == {}


class HparamsTab:
    """What TensorBoard's plugin shows of a folder in the HPARAMS tab."""

    def __init__(self, folder: Path):
        runs = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
        backend = Context(TBContext(data_provider=MultiplexerDataProvider(runs, str(folder))))
        statuses = list(api_pb2.Status.values())
        request = api_pb2.ListSessionGroupsRequest(slice_size=100, allowed_statuses=statuses)
        self.groups = ListSessionGroups(RequestContext(), backend, "", request).run().session_groups
        experiment = GetExperiment(RequestContext(), backend, "", api_pb2.GetExperimentRequest()).run()
        self.columns = {info.name for info in experiment.hparam_infos}

    def row(self, run: str) -> tuple[dict, dict, int]:
        """Return the settings, the metrics and the status of a run."""
        (group,) = (group for group in self.groups if group.sessions[0].name == run)
        settings = {key: getattr(value, value.WhichOneof("kind")) for key, value in group.hparams.items()}
        return settings, {one.name.tag: one.value for one in group.metric_values}, group.sessions[0].status


def test_the_hparams_tab_has_a_row_for_each_run(tmp_path):
    for name, config in {"a": CONFIG, "b": {"model": {"class_path": "x.Other", "init_args": {"width": 2}}}}.items():
        trainer = make_trainer(tmp_path / name, RunRecord(config=config))
        trainer.fit(RecordedModel())
        trainer.test(RecordedModel(), verbose=False)
    tab = HparamsTab(tmp_path)
    assert tab.columns == SETTINGS.keys() | {"model.width"}
    settings, metrics, status = tab.row("a")
    assert settings == SETTINGS
    assert (metrics["test/accuracy"], metrics["train/loss"]) == (0.5, 2.0)
    assert status == api_pb2.STATUS_SUCCESS
    assert tab.row("b")[0] == {"model": "Other", "model.width": 2, "precision": "32-true"}
    assert tab.row("b")[1]["test/accuracy"] == 0.5


def test_a_run_without_a_fit_has_a_row_too(tmp_path):
    make_trainer(tmp_path / "run", RunRecord(config=CONFIG)).test(RecordedModel(), verbose=False)
    settings, metrics, _ = HparamsTab(tmp_path).row("run")
    assert (settings, metrics["test/accuracy"]) == (SETTINGS, 0.5)


@pytest.mark.parametrize(("exception", "raised"), [(RuntimeError, RuntimeError), (KeyboardInterrupt, SystemExit)])
def test_a_run_that_ends_early_has_its_settings_in_the_hparams_tab(tmp_path, exception, raised):
    with pytest.raises(raised):
        make_trainer(tmp_path, RunRecord(config=CONFIG), Stop("fit", exception)).fit(RecordedModel())
    settings, _, status = HparamsTab(tmp_path).row(".")
    assert (settings, status) == (SETTINGS, api_pb2.STATUS_FAILURE)


def test_a_run_that_is_killed_has_its_settings_in_the_hparams_tab(tmp_path):
    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            self.settings, _, self.status = HparamsTab(tmp_path).row(".")  # all that a kill at this time leaves

    look = Look()
    make_trainer(tmp_path, RunRecord(config=CONFIG), look).fit(RecordedModel())
    assert (look.settings, look.status) == (SETTINGS, api_pb2.STATUS_UNKNOWN)


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
