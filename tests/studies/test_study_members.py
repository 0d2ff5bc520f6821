"""A study of ensembles: every member is a seed, and the run's time is a measure."""

import json
import math

import pytest
import torch
from scipy import stats

from datamodules.errors import UserError
from lightning_modules.core.intervals import wilson_interval
from studies.engine import report
from studies.engine.attempt import Attempt
from studies.engine.claims import parse
from studies.engine.judgement import judge
from studies.engine.statistics import Measured
from studies.engine.study import Run, Study

ARMS, MEASURES = ["alone", "together"], ["test/margin", "seconds/fit"]
MARGINS = {"alone": {0: 1.0, 1: 1.5, 2: 1.25}, "together": {0: [2.0, 2.5, 3.0], 3: [2.25, 2.75, None]}}
CLAIMS = {"far": "together > 1", "faster": "ratio(alone.fit, together.fit) > 1"}


def record(margin: float | list[float | None], seconds: float) -> dict:
    """What a run leaves; a list of margins is an ensemble's."""
    of_members = isinstance(margin, list)
    known = [value for value in margin if value is not None] if of_members else [margin]
    metrics = {"test/margin": sum(known) / len(known)}
    own = {"members": {"test/margin": margin}} if of_members else {}
    ends = {"status": "finished", "seconds": {"fit": seconds, "test": 0.5}, "metrics": metrics}
    return ends | own | {"intervals": {}, "n": {}, "seed": 0, "git": {"revision": "a" * 40, "dirty": False}}


@pytest.fixture
def study(tmp_path):
    """Makes a study whose runs lie in their folders, finished."""

    def make(margins: dict[str, dict[int, float | list[float | None]]] = MARGINS) -> Study:
        runs = []
        for arm, by_seed in margins.items():
            for seed, margin in by_seed.items():
                runs.append(Run(arm, seed, "fit", "", tmp_path / "runs" / arm / str(seed), 0))
                runs[-1].folder.mkdir(parents=True)
                results = record(margin, seconds=10.0 + seed if arm == "alone" else 4.0)
                (runs[-1].folder / "results.json").write_text(json.dumps(results))
        claims = [parse(name, text, ARMS, MEASURES) for name, text in CLAIMS.items()]
        return Study("question", tmp_path, ARMS, MEASURES, [], claims, runs, {})

    return make


def verdict(study: Study, name: str):
    (claim,) = (claim for claim in study.claims if claim.id == name)
    return judge(claim, report.collect(study))


def test_each_member_is_a_seed(study):
    margins = report.collect(study())["together"]["test/margin"]
    assert list(margins) == [0, 1, 2, 3, 4, 5]  # the run's seed, and on from there
    values = [measured.value for measured in margins.values()]
    assert values[:5] == [2.0, 2.5, 3.0, 2.25, 2.75]
    assert math.isnan(values[5])  # a member without a value is not passed over


def test_hits_make_a_proportion_of_a_run_and_of_each_member(tmp_path):
    alone = {
        "metrics": {"test/margin": 0.805},
        "intervals": {"test/margin": [0.779, 0.829]},
        "n": {"test/margin": 1000},
    }
    together = {
        "metrics": {"test/margin": 0.5},
        "members": {"test/margin": [0.25, 0.75, None]},
        "n": {"test/margin": 4},
    }
    rest = {"status": "finished", "seconds": {}, "intervals": {}, "git": {"revision": None, "dirty": None}}
    runs = []
    for arm, found, hits in (("alone", alone, [805]), ("together", together, [1, 3, 0])):
        for seed, counted in ((0, {"hits": {"test/margin": hits}}), (10, {})):
            runs.append(Run(arm, seed, "fit", "", tmp_path / arm / str(seed), 0))
            runs[-1].folder.mkdir(parents=True)
            (runs[-1].folder / "results.json").write_text(json.dumps(rest | found | counted))
    values = report.collect(Study("question", tmp_path, ARMS, MEASURES, [], [], runs))
    one = values["alone"]["test/margin"]
    assert one == {0: Measured(0.805, (0.779, 0.829), 1000, 805), 10: Measured(0.805, (0.779, 0.829), 1000, None)}
    members = values["together"]["test/margin"]
    assert members[0] == Measured(0.25, wilson_interval(1, 4), 4, 1)
    assert members[1] == Measured(0.75, wilson_interval(3, 4), 4, 3)
    assert members[10] == Measured(0.25, None, 4, None)  # without hits it is no proportion
    for seed in (2, 12):  # a member without a value has no hits
        assert math.isnan(members[seed].value)
        assert members[seed].hits is None


def test_curves_of_a_run_that_is_taken_up_again_begin_where_it_began(tmp_path):
    folder = tmp_path / "run"
    (folder / "checkpoints").mkdir(parents=True)
    content = {"global_step": 7, "state_dict": {}, "optimizer_states": []}
    torch.save(content, folder / "checkpoints" / "last.ckpt")
    for name in ("members.jsonl", "events.out.tfevents.1", "results.json"):
        (folder / name).write_text(f"{name}\nhalf a li")
    checkpoint = Attempt("fit", "", folder)._make_folder()
    assert torch.load(checkpoint, weights_only=True) == content
    assert sorted(path.name for path in folder.iterdir()) == ["events.out.tfevents.1", "members.jsonl"]
    assert (folder / "members.jsonl").read_text() == "members.jsonl\n"  # the half line of a kill would spoil the next


def test_an_ordinary_runs_seed_is_its_own(study):
    margins = report.collect(study())["alone"]["test/margin"]
    assert margins == {0: Measured(1.0), 1: Measured(1.5), 2: Measured(1.25)}


def test_the_time_of_a_stage_is_a_measure_of_the_run_and_not_of_a_member(study):
    made = study()
    values = report.collect(made)
    assert {seed: measured.value for seed, measured in values["alone"]["seconds/fit"].items()} == {0: 10, 1: 11, 2: 12}
    assert {seed: measured.value for seed, measured in values["together"]["seconds/fit"].items()} == {0: 4, 3: 4}
    assert verdict(made, "faster").estimate.value == pytest.approx(11 / 4)


def test_a_claim_over_members_has_students_interval(study):
    members = [2.0, 2.5, 3.0, 2.25]
    judged = verdict(study({"together": {0: members}}), "far")
    expected = stats.ttest_1samp(members, 0).confidence_interval()
    assert (judged.verdict, judged.estimate.seeds) == ("held", 4)
    assert judged.estimate.value == pytest.approx(2.4375)
    assert (judged.estimate.low, judged.estimate.high) == pytest.approx((expected.low, expected.high))


def test_a_member_without_a_value_leaves_a_claim_undecided(study):
    judged = verdict(study(), "far")
    assert (judged.verdict, judged.note) == ("undecided", "no value in together, seed 5")


def test_members_and_seconds_are_in_the_report(study):
    made = study({"alone": {0: 1.0, 1: 1.5}, "together": {0: [2.0, 2.5, 3.0]}})
    text = report.write(made)
    data = json.loads((made.folder / "report.json").read_text())
    assert data["arms"]["together"]["values"]["test/margin"] == {"0": 2.0, "1": 2.5, "2": 3.0}
    assert data["arms"]["together"]["values"]["seconds/fit"] == {"0": 4.0}
    assert "| 2 2.5 3 " in text


def test_every_member_of_a_diverged_ensemble_is_a_seed_without_a_value(tmp_path):
    ends = record([2.0, 2.5, 3.0], 4.0), record(1.0, 4.0) | {"status": "diverged", "metrics": {}, "step": 7}
    runs = []
    for seed, results in zip((0, 3), ends, strict=True):
        runs.append(Run("together", seed, "fit", "", tmp_path / "runs" / str(seed), 0, members=3))
        runs[-1].folder.mkdir(parents=True)
        (runs[-1].folder / "results.json").write_text(json.dumps(results))
    texts = {"far": "together > 1", "often": "rate(together > 1) > 0.1"}
    claims = [parse(name, text, ["together"], MEASURES) for name, text in texts.items()]
    made = Study("question", tmp_path, ["together"], MEASURES, [], claims, runs)
    values = report.collect(made)["together"]
    assert [measured.diverged for measured in values["test/margin"].values()] == [False] * 3 + [True] * 3
    assert [measured.diverged for measured in values["seconds/fit"].values()] == [False, True]
    for name in texts:
        judged = verdict(made, name)
        assert judged.verdict == "undecided"
        assert judged.note == "diverged: together, seed 3; together, seed 4; together, seed 5"
    unknown = Study("question", tmp_path, ["together"], ["test/nothing"], [], [], runs)
    with pytest.raises(UserError, match="no finished run has 'test/nothing'"):
        report.write(unknown)
