"""What the process around a run does in a job of SLURM, with stand-ins of the run and of SLURM's commands."""

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
from test_study_attempts import leave, save

from studies.engine import slurm
from studies.engine.attempt import Attempt

RUN = """
import signal, sys, time
def end(number, frame):
    print("told", flush=True)
    sys.exit(128 + number)
signal.signal(signal.SIGUSR2, {handler})
open({began!r}, "w").close()
time.sleep(30)
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """Makes a job whose run waits for its end; `after` is the step of the checkpoint that it leaves."""
    former = {number: signal.getsignal(number) for number in (slurm.WARNING, signal.SIGTERM)}
    command = tmp_path / "scontrol"
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setattr(slurm, "NOTICE_PER_MINUTE", 4)
    attempt = Attempt("fit", "", tmp_path / "run")

    def make(after, hears=True, state="interrupted"):
        def start(line, log, environment):
            if after is not None:
                save(attempt.folder, after)
            leave(attempt.folder, state)
            code = RUN.format(handler="end" if hears else "signal.SIG_IGN", began=str(tmp_path / "began"))
            return subprocess.Popen([sys.executable, "-c", code])

        monkeypatch.setattr(slurm, "start_main", start)
        return slurm.OnSlurm(attempt, minutes=1)

    yield make
    for number, handler in former.items():
        signal.signal(number, handler)


def warn_when_begun(folder, number=slurm.WARNING):
    def warn():
        while not (folder / "began").exists():
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    threading.Thread(target=warn, daemon=True).start()


@pytest.mark.parametrize("hears", [True, False])
def test_a_warned_run_ends_and_its_job_is_queued_again(job, tmp_path, monkeypatch, hears):
    monkeypatch.setattr(slurm, "EARLY", 0)  # the warning is one of a preemption, so the run ends at once
    made = job(after=5, hears=hears)
    warn_when_begun(tmp_path)
    with pytest.raises(SystemExit):  # without a result for submitit
        made()
    assert (tmp_path / "calls").read_text() == "requeue 7\n"


def test_without_progress_it_is_not(job, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "EARLY", 0)
    made = job(after=5)
    save(made.attempt.folder, 5)
    warn_when_begun(tmp_path)
    assert made() == 128 + signal.SIGUSR2
    assert "without a step of progress" in (made.attempt.folder / "notes.txt").read_text()
    assert not (tmp_path / "calls").exists()


def test_nor_is_a_job_whose_run_failed(job, tmp_path, monkeypatch):
    monkeypatch.setattr(slurm, "EARLY", 0)
    made = job(after=5, state="failed")
    warn_when_begun(tmp_path)
    assert made() == 128 + signal.SIGUSR2
    assert not (tmp_path / "calls").exists()


def test_an_early_warning_waits_for_the_last_moment(job):
    made, now = job(after=5), time.monotonic()
    made._warn(started=now - 20)  # of a limit of 60 s, with 4 s of notice
    assert made._end_at == pytest.approx(now + 36, abs=1)
    made._warn(started=now - 58)
    assert made._end_at == pytest.approx(now, abs=1)
    made.minutes = 60
    made._warn(started=now - 20)  # an hour too early: SLURM wants the node
    assert made._end_at == pytest.approx(now, abs=1)


def test_a_job_has_left_when_slurm_has_not_shown_it_twice(monkeypatch):
    answers = iter([{"7_0", "7_1"}, {"7_1"}, None, {"7_0", "7_1"}, {"7_1"}, None, {"7_1"}])
    monkeypatch.setattr(slurm, "ASK_EVERY", -1)
    monkeypatch.setattr(slurm.Queue, "_ask", staticmethod(lambda: next(answers)))
    queue = slurm.Queue()
    assert [queue.has_left("7_0") for _ in range(7)] == [False] * 6 + [True]


def test_a_controller_that_does_not_answer_says_nothing(tmp_path, monkeypatch):
    command = tmp_path / "squeue"
    command.write_text("#!/bin/sh\nexit 1\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm.Queue._ask() is None
    command.unlink()
    assert slurm.Queue._ask() is None
