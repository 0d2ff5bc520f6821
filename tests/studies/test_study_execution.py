"""The share of the machine that a run gets, and the runs that are left out."""

import json
import os
from functools import partial

import pytest
import torch
from tiny_study import AtOnce, Ended

from studies.engine.attempt import NOTES
from studies.engine.execution import Cluster, _environment, execute, prepare
from studies.engine.study import Run, Study

RECORD = {"seconds": {"fit": 2.0}, "metrics": {"test/loss": 0.5}, "intervals": {}, "n": {}}
RECORD |= {"git": {"revision": None, "dirty": None}}


@pytest.mark.parametrize(
    ("visible", "count", "expected"),
    [("3,5", 0, ["3", "5", "3"]), (None, 2, ["0", "1", "0"]), (None, 0, [None] * 3), ("", 0, [None] * 3)],
)
def test_runs_take_gpus_by_turns(monkeypatch, visible, count, expected):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert [_environment(slot, 3).get("CUDA_VISIBLE_DEVICES") for slot in range(3)] == expected


def test_runs_share_the_cores_unless_the_user_says_how_many_threads(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert [_environment(0, at_once)["OMP_NUM_THREADS"] for at_once in (1, 3, 9)] == ["8", "2", "1"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert _environment(0, 3)["OMP_NUM_THREADS"] == "5"


class Leaves(AtOnce):
    """Ends every attempt with the state that its arm is named after, or without a record."""

    def __init__(self):
        self.seen, self.prepared = [], []

    def prepare(self, slot, environment):
        self.prepared.append((slot, environment["OMP_NUM_THREADS"]))

    def submit(self, attempt, slot):
        arm = attempt.folder.parent.name
        self.seen.append((arm, slot, attempt.environment["OMP_NUM_THREADS"]))
        attempt.folder.mkdir(parents=True, exist_ok=True)
        if arm in ("finished", "diverged"):
            (attempt.folder / "results.json").write_text(json.dumps(RECORD | {"status": arm, "step": 7}))
            (attempt.folder / NOTES).write_text("a note\n")
        return Ended()


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    """Return a function that executes a study of one seed: arm -> (wave, arms whose files it uses)."""
    executor = Leaves()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)

    def call(arms, jobs=2, where="local"):
        make = partial(Run, seed=0, command="fit", config="")
        folders = {arm: tmp_path / "runs" / arm / "0-a" for arm in arms}
        used = {arm: tuple(str(folders[other] / "last.ckpt") for other in others) for arm, (_, others) in arms.items()}
        runs = [make(arm, folder=folders[arm], wave=arms[arm][0], uses=used[arm]) for arm in arms]
        executor.__init__()
        study = Study("question", tmp_path, list(arms), ["test/loss"], [], [], runs)
        failed = [run.arm for run in execute(study, Cluster(where, jobs), executor)]
        return failed, executor.seen, "".join(capsys.readouterr())

    call.executor = executor
    return call


def test_a_run_that_needs_a_lost_one_is_left_out_and_fails_only_with_it(call):
    failed, seen, shown = call(
        {
            "finished": (0, []),
            "diverged": (0, []),
            "broken": (0, []),
            "a": (1, ["diverged"]),
            "b": (1, ["broken", "finished"]),
            "c": (2, ["a"]),
            "d": (2, ["diverged", "b"]),
        }
    )
    assert failed == ["broken", "b", "d"]
    assert [arm for arm, *_ in seen] == ["finished", "diverged", "broken"]
    for sentence in (
        "finished: finished, seed 0, test/loss 0.5, 2 s",
        "finished, seed 0: a note",
        "DIVERGED: diverged, seed 0, at step 7",
        "FAILED: broken, seed 0 (no results.json)\n",
        "left out: a, seed 0, because diverged diverged\n",
        "left out: b, seed 0, because broken failed\n",
        "left out: c, seed 0, because a was left out\n",
        "left out: d, seed 0, because diverged diverged and b failed\n",
    ):
        assert sentence in shown


def test_what_has_ended_is_told_and_not_run_again(call):
    arms = {"finished": (0, []), "diverged": (0, []), "broken": (1, ["finished"])}
    assert "already" not in call(arms)[2]
    failed, seen, shown = call(arms)
    assert failed == [arm for arm, *_ in seen] == ["broken"]
    assert "1 of 3 runs are already finished\n1 of 3 runs have diverged\n" in shown


def test_a_wave_divides_the_machine_by_its_own_runs(call):
    _, seen, _ = call({"a": (0, []), "b": (0, []), "c": (0, []), "d": (0, []), "e": (1, [])}, jobs=3)
    assert {threads for arm, _, threads in seen if arm != "e"} == {"2"}
    assert sorted(slot for arm, slot, _ in seen if arm != "e") == [0, 0, 1, 2]
    assert seen[-1] == ("e", 0, "6")


@pytest.mark.parametrize(("spares", "threads"), [(0, ["2", "2", "2", "6"]), (1, ["2", "2", "6"])])
def test_the_interpreter_of_the_next_run_without_one_is_prepared(call, spares, threads):
    call.executor.spares = spares
    call({"a": (0, []), "b": (0, []), "c": (0, []), "d": (0, []), "e": (1, [])}, jobs=3)
    assert [share for _, share in call.executor.prepared] == threads


def test_the_first_interpreter_has_the_share_of_the_first_wave(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setattr("studies.engine.execution.first_wave", lambda file: 2)
    prepare(executor := Leaves(), Cluster(jobs=3), None)
    prepare(executor, Cluster("slurm", jobs=3), None)
    assert executor.prepared == [(0, "3")]


def test_a_run_that_only_seems_finished_is_told_and_what_an_attempt_left_is_removed(call, tmp_path):
    arms = {"finished": (0, []), "broken": (0, [])}
    call(arms)
    aside = tmp_path / "runs" / "finished" / "0-a.interrupted"
    aside.mkdir()
    record = tmp_path / "runs" / "broken" / "0-a" / "results.json"
    record.write_text("{")
    shown = call(arms)[2]
    assert f"not finished: broken, seed 0: {record} is damaged: it is not whole JSON\n" in shown
    assert f"FAILED: broken, seed 0 ({record} is damaged" in shown
    assert not aside.exists()


@pytest.mark.parametrize(("jobs", "at_once"), [(0, 3), (2, 2)])
def test_an_interrupted_study_cancels_its_jobs_on_slurm(call, monkeypatch, jobs, at_once):
    class Interrupts:
        def done(self):
            raise KeyboardInterrupt

    submitted, cancelled = [], []

    def submit(attempts, name, folder, options):
        submitted.append((name, options))
        return [Interrupts() for _ in attempts]

    monkeypatch.setattr("studies.engine.slurm.submit", submit)
    monkeypatch.setattr("studies.engine.slurm.cancel", cancelled.extend)
    with pytest.raises(KeyboardInterrupt):
        call({"a": (0, []), "b": (0, []), "c": (0, []), "d": (1, [])}, jobs, "slurm")
    assert submitted == [("question-wave0", {"slurm_array_parallelism": at_once})]
    assert len(cancelled) == 3
