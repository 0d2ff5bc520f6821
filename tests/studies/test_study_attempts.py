"""Attempts at a run: what counts as its end, which checkpoint it continues from, and that none is ever lost."""

import errno
import fcntl
import json
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

import pytest
import torch

from studies.engine import attempt as attempts
from studies.engine.attempt import Attempt
from studies.engine.products import LAST

ENDED = {"status": "finished", "seconds": {}, "metrics": {}, "intervals": {}, "n": {}}
ENDED |= {"git": {"revision": None, "dirty": None}}


def save(folder, step, name="last.ckpt", **content):
    (folder / "checkpoints").mkdir(parents=True, exist_ok=True)
    content = {
        "state_dict": {"w": torch.full((8,), float(step))},
        "optimizer_states": [],
        "global_step": step,
    } | content
    torch.save(content, folder / "checkpoints" / name)


def damage(path):
    path.write_bytes(path.read_bytes()[:-40])


def leave(folder, status, **keys):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(ENDED | {"status": status} | keys))


@pytest.fixture
def make(tmp_path):
    """Makes an attempt, and a stand-in of the program that trains to a step and leaves a state."""

    def make(**options):
        return Attempt("fit", "", tmp_path / "run", **options)

    return make


def trains_to(step, status="finished", code=0, seen=None):
    def run(line, log, environment):
        if seen is not None:
            seen.append(int(torch.load(line[-1], weights_only=True)["global_step"]) if "--ckpt_path" in line else None)
        if step is not None:
            save(log.parent, step)
        if status:
            leave(log.parent, status)
        return code

    return run


def test_the_command_line_names_the_config_and_the_folder(tmp_path):
    attempt, lines = Attempt("fit", "seed_everything: 3", tmp_path / "runs" / "arm" / "0"), []
    assert attempt.outcome().state == ""
    assert attempt(lambda line, *_: lines.append(line) or 7) == 7
    assert attempt.outcome().state == "no results.json"
    config = tmp_path / "runs" / "arm" / "0.yaml"
    assert lines == [["fit", "--config", str(config), "--trainer.default_root_dir", str(attempt.folder)]]
    assert config.read_text() == "seed_everything: 3"


def test_an_attempt_waits_for_one_that_still_runs(make, tmp_path):
    attempt, codes = make(), []
    with open(tmp_path / "run.lock", "w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        thread = threading.Thread(target=lambda: codes.append(attempt(lambda *_: pytest.fail("it ran"))))
        thread.start()
        thread.join(0.2)
        assert thread.is_alive()
        leave(tmp_path / "run", "finished")
    thread.join(10)
    assert codes == [0]


@pytest.mark.parametrize("status", ["interrupted", "failed", "running", None])
def test_exit_code_0_does_not_finish_a_run(make, status):
    attempt, seen = make(), []
    assert attempt(trains_to(4, status, 0, seen)) == 1
    assert attempt(trains_to(8, "finished", 0, seen)) == 0
    assert seen == [None, 4]
    assert not attempt.folder.with_name("run.interrupted").exists()
    assert attempt(trains_to(9, "finished", 0, seen)) == 0
    assert len(seen) == 2  # a finished run is not run again


def test_a_diverged_run_is_not_run_again(make):
    attempt = make(leaves=("checkpoints/last.ckpt",))
    attempt(trains_to(None, "diverged", 1))
    assert attempt.outcome().record["status"] == "diverged"
    assert attempt(lambda *_: pytest.fail("it ran")) == 0


def test_a_run_that_resumes_at_its_last_step_and_writes_nothing_keeps_its_weights(make):
    attempt = make(leaves=("checkpoints/last.ckpt",))
    attempt(trains_to(8, "running", 137))
    assert attempt(trains_to(None, "finished")) == 1  # what other runs need is not there
    assert attempt.outcome().damage == f"{attempt.folder / LAST}, which other runs need, is missing"
    assert attempt.saved().step == 8
    assert attempt(trains_to(8, "finished")) == 0
    damage(attempt.folder / LAST)
    assert attempt.outcome().damage == f"{attempt.folder / LAST}, which other runs need, is damaged"
    shutil.rmtree(attempt.folder)
    save(attempt.folder, 8)
    without = make()
    assert without(trains_to(None, "finished")) == 0
    assert without.saved().step == 8


@pytest.mark.parametrize("place", ["run", "run.interrupted"])
def test_a_damaged_last_checkpoint_leaves_the_newest_neighbour(make, tmp_path, place):
    folder = tmp_path / place
    save(folder, 9)
    damage(folder / LAST)
    save(folder, 7, "epoch=0-step=7.ckpt")
    save(folder, 5, "previous.ckpt")  # written later: the step counts, not the time
    torch.save({"state_dict": {}, "global_step": 8}, folder / "checkpoints" / "weights.ckpt")  # no optimizer to go on
    torch.save([1], folder / "checkpoints" / "list.ckpt")
    attempt, seen = make(), []
    attempt(trains_to(12, "finished", 0, seen))
    assert seen == [7]
    note = f"{folder / LAST} is damaged: continues from epoch=0-step=7.ckpt, step 7\n"
    assert (attempt.folder / "notes.txt").read_text() == note


def test_a_newer_checkpoint_that_cannot_be_read_now_is_kept(make, tmp_path):
    save(tmp_path / "run.interrupted", 4)
    save(tmp_path / "run", 9)
    damage(tmp_path / "run" / LAST)  # or the file system has failed for a moment
    attempt, seen = make(), []
    attempt(trains_to(12, "finished", 0, seen))
    assert seen == [4]
    assert (tmp_path / "run.kept-1" / LAST).is_file()


def test_without_a_whole_checkpoint_a_run_begins_anew_and_says_so(make, tmp_path):
    for name in ("run", "run.interrupted"):
        save(tmp_path / name, 9)
        damage(tmp_path / name / LAST)
    attempt, seen = make(), []
    attempt(trains_to(12, "finished", 0, seen))
    assert seen == [None]
    note = f"begins anew, because it cannot continue from {attempt.folder / LAST}\n"
    assert (attempt.folder / "notes.txt").read_text() == note
    assert all((tmp_path / f"run.kept-{number}" / LAST).is_file() for number in (1, 2))
    assert not (tmp_path / "run.interrupted").exists()


def test_curves_go_on_up_to_the_last_whole_line(make, tmp_path):
    save(tmp_path / "run", 4)
    (tmp_path / "run" / "events.out.tfevents.1").write_text("curve")
    (tmp_path / "run" / "members.jsonl").write_text('{"step": 2}\n{"step": 4}\n{"st')
    attempt = make()
    attempt(trains_to(8, "failed"))
    assert (attempt.folder / "events.out.tfevents.1").read_text() == "curve"
    assert (attempt.folder / "members.jsonl").read_text() == '{"step": 2}\n{"step": 4}\n'
    assert not (attempt.folder / "notes.txt").exists()  # nothing to say


def test_a_test_does_not_continue(make, tmp_path):
    save(tmp_path / "run", 4)
    attempt, seen = make(), []
    attempt.command = "test"
    attempt(trains_to(None, "finished", 0, seen))
    assert seen == [None]
    assert not (attempt.folder / "notes.txt").exists()


@pytest.mark.parametrize(("ours", "aside", "expected"), [(4, 9, 9), (9, 4, 9), (9, 9, 9), (None, 4, 4), (4, None, 4)])
def test_the_newer_of_two_folders_counts(make, tmp_path, ours, aside, expected):
    for name, step in (("run", ours), ("run.interrupted", aside)):
        if step is not None:
            save(tmp_path / name, step)
    attempt, seen = make(), []
    assert attempt.saved().path.is_relative_to(tmp_path / ("run" if ours == expected else "run.interrupted"))
    attempt(trains_to(None, "failed", 1, seen))
    assert seen == [expected]
    assert attempt.saved().step == expected


@pytest.mark.parametrize(
    ("ours", "aside", "stays"),
    [(9, 4, False), (9, 9, False), (4, 9, True), (None, 4, True), (None, None, False), (9, None, False)],
)
def test_what_an_attempt_has_left_is_removed_only_if_it_is_older(make, tmp_path, ours, aside, stays):
    for name, step in (("run", ours), ("run.interrupted", aside)):
        (tmp_path / name).mkdir()
        if step is not None:
            save(tmp_path / name, step)
    attempts.remove_aside(tmp_path / "run")
    assert (tmp_path / "run.interrupted").exists() == stays


def test_a_run_whose_inputs_changed_runs_again(make, tmp_path):
    save(tmp_path / "control", 3)
    used = str(tmp_path / "control" / LAST)
    attempt, seen = make(uses=(used,)), []
    assert attempt(trains_to(4, "finished", 0, seen)) == 0
    assert attempt.outcome().record
    shutil.copy(used, f"{used}.copy")
    os.replace(f"{used}.copy", used)  # another file with the same content
    assert attempt.outcome().record
    Path(used).rename(f"{used}.away")
    assert attempt.outcome().record  # the run that makes it runs again first
    save(tmp_path / "control", 3, state_dict={"w": torch.ones(8)})
    save(tmp_path / "run.interrupted", 9)
    assert attempt.outcome().damage == f"{used} has changed since {attempt.folder} used it"
    assert attempt(trains_to(4, "finished", 0, seen)) == 0
    assert seen == [None, None]  # and not from its own checkpoint
    assert not (tmp_path / "run.interrupted").exists()
    assert attempt.outcome().record


@pytest.mark.parametrize("step", ["parent", "curves"])
def test_a_folder_that_cannot_be_made_is_one_sentence(make, tmp_path, capsys, monkeypatch, step):
    attempt = make()
    if step == "parent":
        attempt.folder = tmp_path / "file" / "run"
        (tmp_path / "file").write_text("in the way")
    else:
        save(attempt.folder, 4)
        (attempt.folder / "events.out.tfevents.1").touch()
        full = OSError(errno.ENOSPC, "No space left on device")
        monkeypatch.setattr(shutil, "copy", lambda *_: (_ for _ in ()).throw(full))
    assert attempt(lambda *_: pytest.fail("it ran")) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: cannot prepare the folder {attempt.folder}: [Errno ")
    assert error.count("\n") == 1
    if step == "curves":
        assert attempt.saved().step == 4  # a full disk costs nothing


def kill_at(number, attempt, run):
    """Run an attempt in a child that ends without notice at the line of `attempt.py` with this number in its course.

    Returns whether the child came to that line.
    """
    child = os.fork()
    if child == 0:
        count = 0

        def trace(frame, event, argument):
            nonlocal count
            if frame.f_code.co_filename not in (attempts.__file__, shutil.__file__):
                return None
            if event == "line":
                count += 1
                if count == number:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        try:
            attempt(run)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


@pytest.mark.parametrize("aside", [None, 3])
def test_a_kill_between_any_two_lines_loses_no_checkpoint(tmp_path, aside):
    """Kills the second attempt at every third line of it and of `shutil`; the newest checkpoint survives every kill."""
    for number in range(1 if aside else 2, 900, 3):
        attempt = Attempt("fit", "", tmp_path / str(number) / "run")
        save(attempt.folder, 6)
        leave(attempt.folder, "running")
        if aside:
            save(attempt.folder.with_name("run.interrupted"), aside)
        killed = kill_at(number, attempt, trains_to(8, "finished"))
        assert attempt.saved().step >= 6, number
        seen = []
        assert attempt(trains_to(8, "finished", 0, seen)) == 0
        assert seen in ([6], [8], []), number  # nothing is trained twice
        assert attempt.saved().step == 8
        shutil.rmtree(attempt.folder.parent)
        if not killed:
            break
    assert not killed
    assert number > 50  # the trace saw the lines
