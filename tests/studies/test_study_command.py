"""`study` from end to end, on runs of a second that share one interpreter: report, failure, options."""

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from tiny_study import FOLDER, STUDY, AtOnce, Ended, in_this_interpreter, reports, write_study

import main as cli
from studies.engine import ledger, report


@pytest.fixture
def study(workplace, capsys):
    """Runs the study with options and keys in this interpreter; returns what it prints."""

    def call(*options, exit_code=0, **keys):
        line = [*write_study(**keys), *options]
        with in_this_interpreter():
            if exit_code:
                with pytest.raises(SystemExit) as ended:
                    cli.main(line)
                assert ended.value.code == exit_code
            else:
                cli.main(line)
        shown = capsys.readouterr()
        return shown.out + shown.err

    return call


def test_a_study_ends_in_a_report_and_is_not_run_twice(study):
    study("--report-only")
    assert json.loads(reports()[0])["finished"] == 0
    assert not (FOLDER / "runs").exists()
    shown = study()
    data = json.loads((FOLDER / "report.json").read_text())
    assert (data["runs"], data["finished"]) == (2, 2)
    assert [row["verdict"] for row in data["claims"]] == ["undecided", "refuted"]
    assert data["claims"][0]["note"] == "one seed, whose run gives no interval; at least 2 seeds would show the spread"
    made = {
        arm: json.loads(next((FOLDER / "runs" / arm).glob("*/results.json")).read_text())
        for arm in ("control", "silenced")
    }
    for arm, record in made.items():
        for measure in STUDY["measures"]:
            assert data["arms"][arm]["values"][measure] == {"0": record["metrics"][measure]}
            assert f"{record['metrics'][measure]:.3g}" in shown
    accuracy = data["arms"]["control"]["estimates"]["test/accuracy"]
    assert [accuracy["low"], accuracy["high"]] == pytest.approx(made["control"]["intervals"]["test/accuracy"])
    assert made["silenced"]["metrics"]["test/loss"] != made["control"]["metrics"]["test/loss"]
    rows = (FOLDER / "runs.csv").read_text().splitlines()
    assert rows[0].startswith("arm,seed,status,seconds,revision")
    assert [row.split(",")[:3] for row in rows[1:]] == [["control", "0", "finished"], ["silenced", "0", "finished"]]
    pictures = {path.name for path in (FOLDER / "figures").iterdir()}
    assert pictures == {"strip_test_loss.png", "strip_test_accuracy.png", "curve_validation_loss.png"}
    assert list((FOLDER / "tensorboard").rglob("events*"))
    assert not list(FOLDER.glob("*.tmp"))

    first, began = reports(), time.monotonic()
    again = study()
    assert "2 of 2 runs are already finished" in again
    assert time.monotonic() - began < 60
    assert reports() == first


def test_two_calls_do_not_write_the_report_at_once(study, monkeypatch):
    def write(made):
        with open(made.folder / "report.lock") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return "written alone"

    monkeypatch.setattr(report, "write", write)
    assert "written alone" in study("--report-only")


def test_a_measure_or_a_curve_that_no_run_has(study):
    assert "no curve of validation/nope, because no finished run" in study(curves=["validation/nope"])
    shown = study(measures=["test/loss", "test/acuracy"], claims={}, exit_code=2)
    assert "no finished run has 'test/acuracy'; did you mean 'test/accuracy'?" in shown


def test_a_failing_arm_leaves_the_others_and_a_bad_exit_code(study):
    # The site is looked for when the run begins, so that the config by itself is right
    clamp = {"class_path": "ActivationClamp", "init_args": {"site": "nowhere", "mode": "zero"}}
    dependent = {"command": "test", "set": {"ckpt_path": "{arms.broken.checkpoint}"}}
    arms = {"control": {}, "broken": {"set": {"trainer.callbacks": [clamp]}}, "dependent": dependent}
    claims = {"one": "control.loss > 0", "two": "broken.loss > 0"}
    shown = study("--jobs", "2", arms=arms, claims=claims, exit_code=1)
    assert "FAILED: broken, seed 0" in shown
    assert "'nowhere'" in shown
    assert "left out: dependent, seed 0, because broken failed" in shown
    assert "2 of 3 runs failed: broken, seed 0, dependent, seed 0" in shown
    data = json.loads(reports()[0])
    assert data["finished"] == 1
    assert [row["note"] for row in data["claims"]][1] == "no finished run of broken has test/loss"
    assert data["arms"]["control"]["values"]["test/loss"]


def test_a_diverged_arm_is_an_end_without_values(study):
    dependent = {"command": "test", "set": {"ckpt_path": "{arms.hot.checkpoint}"}}
    hot = {"set": {"model.optimizer.lr": 1.0e18}}
    claims = {"one": "hot.loss > 0", "two": "difference(control, hot) < 9", "three": "rate(hot.accuracy > 0.5) < 0.9"}
    shown = study(arms={"control": {}, "hot": hot, "dependent": dependent}, claims=claims)
    (record,) = (json.loads(path.read_text()) for path in FOLDER.glob("runs/hot/*/results.json"))
    assert record["status"] == "diverged"
    step = record["step"]
    assert f"DIVERGED: hot, seed 0, at step {step}" in shown
    assert "left out: dependent, seed 0, because hot diverged" in shown
    data, text = reports()
    assert f"hot, seed 0, diverged at step {step}." in text
    assert "Missing: dependent, seed 0." in text
    report = json.loads(data)
    assert (report["finished"], report["diverged"]) == (1, [{"arm": "hot", "seed": 0, "step": step}])
    assert report["arms"]["hot"]["values"] == {measure: {"0": None} for measure in STUDY["measures"]}
    assert [row["verdict"] for row in report["claims"]] == ["undecided"] * 3
    assert [row["note"] for row in report["claims"]] == ["diverged: hot, seed 0"] * 3
    assert ",diverged," in (FOLDER / "runs.csv").read_text()
    again = study(arms={"control": {}, "hot": hot, "dependent": dependent}, claims=claims)
    assert "1 of 3 runs have diverged" in again
    assert "DIVERGED" not in again
    assert reports() == [data, text]


def test_arms_that_used_a_changed_checkpoint_run_again(study):
    study()
    (control,) = FOLDER.glob("runs/control/*/")
    (silenced,) = FOLDER.glob("runs/silenced/*/results.json")
    first, made = reports(), silenced.stat().st_mtime_ns
    last = control / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-100])
    shown = study()
    assert f"not finished: control, seed 0: {last}, which other runs need, is damaged" in shown
    assert f"control, seed 0: {last} is damaged: continues from previous.ckpt" in shown
    assert reports() == first
    assert silenced.stat().st_mtime_ns != made  # another file, so the arm that used it ran again
    last.unlink()
    (control / "results.json").unlink()
    shown = study("--report-only")
    assert "1 of 2 runs finished" in shown


def test_the_first_spare_interpreter_is_of_use_where_the_wave_is_smaller_than_the_number_of_jobs(study, monkeypatch):
    prepared, used = {}, {}
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(AtOnce, "prepare", lambda self, slot, environment: prepared.setdefault(slot, environment))
    monkeypatch.setattr(AtOnce, "submit", lambda self, attempt, slot: used.setdefault(slot, attempt) and Ended())
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    study("--jobs", "4", seeds=2, exit_code=1)
    assert prepared[0] == used[0].environment
    assert prepared[0]["OMP_NUM_THREADS"] == "4"


def test_help_reads_well(workplace, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", "--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    for word in ("FILE", "--jobs", "--executor", "--partition", "--report-only", "runs/studies"):
        assert word in shown


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        (["question.yaml", "--jobs", "-1"], "--jobs -1: it must be at least 0"),
        (["question.yaml", "--hours", "0"], "--hours 0.0: it must be at least 0.0167"),
        (["question.yaml", "--executor", "slrum"], "slrum"),
        (["question.yaml", "--partition", "gpu"], "--partition has no effect here: add --executor slurm"),
        (["question.yaml", "--partitoin", "gpu"], "there is no option --partitoin; did you mean '--partition'?"),
        (["question.yaml", "--setup", "[a, 1]"], "argument --setup: [a, 1] is not a list of shell lines"),
        (["question.yaml", "twice.yaml"], "there is no use for the argument twice.yaml"),
        (["nothing.yaml"], "there is no study nothing.yaml"),
        (["queston.yaml"], "there is no study queston.yaml; did you mean question.yaml?"),
        (["configs"], "the study configs cannot be read"),
        ([], "the following arguments are required: FILE"),
    ],
)
def test_options_are_checked(workplace, capsys, line, sentence):
    write_study()
    with pytest.raises(SystemExit) as ended:
        cli.main(["study", *line])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert sentence in error
    assert error.startswith("error: ")
    assert "Traceback" not in error


def test_a_study_needs_a_folder(study):
    Path("runs").write_text("in the way")
    assert "the study's folder runs/studies/question cannot be made" in study("--report-only", exit_code=2)


def test_the_ledger_and_the_help_import_no_heavy_package():
    code = """
import sys, main
main.main(["ledger", "--document", "000"])
try:
    main.main(["study", "--help"])
except SystemExit:
    heavy = {"torch", "lightning", "scipy", "matplotlib", "tensorboard", "submitit", "numpy", "jsonargparse"}
    print("imported:", sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.endswith("imported: []\n"), done.stdout + done.stderr
    assert str(len([entry for entry in ledger.read() if entry.id.startswith("000")])) in done.stdout
