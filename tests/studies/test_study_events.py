"""TensorBoard's HPARAMS tab, read by its own plugin, and the size of figures."""

import json

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins import base_plugin
from tensorboard.plugins.hparams import api_pb2, backend_context, list_session_groups

from studies.engine import report
from studies.engine.arms import Factors
from studies.engine.study import Run, Study

MEASURES = ["test/accuracy", "seconds/fit"]
SETTINGS = {
    "control": {"model.width": 16, "model.compile": False},
    "wide_24": {"model.width": 24, "model.compile": True, "ActivationClamp.site": "final_norm"},
    "wide_32": {"model.width": 32, "model.compile": True, "ActivationClamp.site": "final_norm"},
    "absent": {"model.width": 16, "model.compile": True, "ckpt_path": "{arms.control.checkpoint}"},
}
FACTORS = {
    f"wide_{width}": Factors("wide", {"model.width": width, "clamp.site": "final_norm", "tied": [1]})
    for width in (24, 32)
}


@pytest.fixture
def study(tmp_path):
    """A study with finished runs of all arms but the last."""
    runs = []
    for arm in SETTINGS:
        for seed in (0, 1):
            runs.append(Run(arm, seed, "fit", "", tmp_path / "runs" / arm / str(seed), 0, frozenset()))
            if arm != "absent":
                runs[-1].folder.mkdir(parents=True)
                metrics = {"test/accuracy": None if (arm, seed) == ("wide_32", 1) else 0.25 * (1 + seed)}
                record = {"status": "finished", "seconds": {"fit": 2.0}, "metrics": metrics, "intervals": {}, "n": {}}
                record |= {"git": {"revision": "a" * 40, "dirty": False}}
                (runs[-1].folder / "results.json").write_text(json.dumps(record))
    return Study("question", tmp_path, list(SETTINGS), MEASURES, [], [], runs, FACTORS, SETTINGS)


def of_hparams(folder):
    """The experiment and its session groups, as the plugin gives them to the page."""
    multiplexer = EventMultiplexer().AddRunsFromDirectory(str(folder)).Reload()
    provider = MultiplexerDataProvider(multiplexer, str(folder))
    context = backend_context.Context(base_plugin.TBContext(data_provider=provider))
    request = RequestContext()
    metadata = context.hparams_metadata(request, "")
    experiment = context.experiment_from_metadata(request, "", True, metadata, None)
    everything = api_pb2.ListSessionGroupsRequest(
        allowed_statuses=[api_pb2.STATUS_SUCCESS, api_pb2.STATUS_UNKNOWN, api_pb2.STATUS_RUNNING], slice_size=100
    )
    groups = list_session_groups.Handler(request, context, "", everything).run()
    return experiment, groups.session_groups


def test_every_finished_run_is_a_row_with_hyperparameters_and_measures(study):
    report.write(study)
    experiment, groups = of_hparams(study.folder / "tensorboard")
    infos = {info.name: info for info in experiment.hparam_infos}
    assert set(infos) == {"arm", "seed", "model.width", "model.compile", "tied", "ActivationClamp.site", "ckpt_path"}
    assert list(infos["model.width"].domain_discrete) == [16, 24, 32]
    assert list(infos["model.compile"].domain_discrete) == ["false", "true"]
    assert [info.name.tag for info in experiment.metric_infos] == MEASURES

    rows = {}
    for group in groups:
        (session,) = group.sessions
        assert session.status == api_pb2.STATUS_SUCCESS
        hparams = {name: getattr(value, value.WhichOneof("kind")) for name, value in group.hparams.items()}
        metrics = {metric.name.tag: metric.value for metric in session.metric_values}
        rows[hparams["arm"], hparams["seed"]] = hparams, metrics
    assert sorted(rows) == [(arm, seed) for arm in ("control", "wide_24", "wide_32") for seed in (0, 1)]
    hparams, metrics = rows["wide_24", 1]
    of_arm = {"model.width": 24, "model.compile": "true", "ActivationClamp.site": "final_norm", "tied": "[1]"}
    assert hparams == {"arm": "wide_24", "seed": 1} | of_arm
    assert metrics == {"test/accuracy": 0.5, "seconds/fit": 2.0}
    assert rows["wide_32", 1][1] == {"seconds/fit": 2.0}  # a run without a value has none
    assert rows["control", 0][0] == {"arm": "control", "seed": 0, "model.width": 16, "model.compile": "false"}
