"""Every run has a row with its settings and metrics in TensorBoard's HPARAMS tab."""

from pathlib import Path

import pytest
from lightning.pytorch.callbacks import Callback
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.base_plugin import TBContext
from tensorboard.plugins.hparams import api_pb2
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.get_experiment import Handler as GetExperiment
from tensorboard.plugins.hparams.list_session_groups import Handler as ListSessionGroups
from toy_run import RecordedModel, Stop, make_trainer

from callbacks.hyperparameters import main_settings
from callbacks.run_record import RunRecord

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
    # TensorBoard keeps the first end of a run, and this one may be resumed in the same folder
    assert (settings, status) == (SETTINGS, api_pb2.STATUS_UNKNOWN)


def test_a_run_that_is_killed_has_its_settings_in_the_hparams_tab(tmp_path):
    class Look(Callback):
        def on_train_start(self, trainer, pl_module):
            self.settings, _, self.status = HparamsTab(tmp_path).row(".")  # all that a kill at this time leaves

    look = Look()
    make_trainer(tmp_path, RunRecord(config=CONFIG), look).fit(RecordedModel())
    assert (look.settings, look.status) == (SETTINGS, api_pb2.STATUS_UNKNOWN)
