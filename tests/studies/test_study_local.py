"""Spare interpreters: when one is used, when it is replaced, and that none outlives its study."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field

import pytest

from studies.engine import local
from studies.engine.local import LocalExecutor

QUICK = """
import pickle, sys
if message := sys.stdin.buffer.read():
    sys.exit(pickle.loads(message)())
"""


@dataclass
class Work:
    """An attempt that runs a line of Python."""

    code: str
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self):
        exec(self.code)
        return 0


@pytest.fixture
def executor(monkeypatch):
    """An executor whose interpreters do not import the program."""
    monkeypatch.setattr(local, "WAIT", QUICK)
    monkeypatch.setattr(local, "GRACE", 0.5)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    with LocalExecutor() as executor:
        yield executor


def ended(job):
    deadline = time.monotonic() + 60
    while not job.done():
        assert time.monotonic() < deadline, "the interpreter did not end in a minute"
        time.sleep(0.01)
    return job.process.returncode


def test_an_attempt_runs_in_the_spare_of_its_slot(executor, tmp_path):
    executor.prepare(1, {"SHARE": "4"})
    spare = executor._spares[1].process.pid
    executor.prepare(1, {"SHARE": "5"})  # the slot has one already
    assert executor.spares == 1
    code = f"import os; open({str(tmp_path / 'seen')!r}, 'w').write(f\"{{os.getpid()}} {{os.environ['SHARE']}}\")"
    elsewhere = executor.submit(Work("pass", {"SHARE": "4"}), slot=0)
    job = executor.submit(Work(code, {"SHARE": "4"}), slot=1)
    assert (ended(job), ended(elsewhere)) == (0, 0)
    assert (tmp_path / "seen").read_text() == f"{spare} 4"
    assert elsewhere.process.pid != spare
    assert executor.spares == 0


@pytest.mark.parametrize("reason", ["other environment", "changed code", "ended"])
def test_a_spare_that_does_not_fit_is_replaced(executor, monkeypatch, tmp_path, reason):
    executor.prepare(0, {"SHARE": "4"})
    spare = executor._spares[0]
    if reason == "changed code":
        (tmp_path / "cli").mkdir()
        monkeypatch.setattr(local, "MAIN", tmp_path / "main.py")
        (tmp_path / "main.py").touch()
        os.utime(tmp_path / "main.py", (0, 0))
        assert spare.is_current()
        (tmp_path / "cli" / "app.py").touch()
        os.utime(tmp_path / "cli" / "app.py", (spare.started + 1, spare.started + 1))
        assert not spare.is_current()
    elif reason == "ended":
        spare.process.kill()
        ended(spare)
    job = executor.submit(Work("pass", {"SHARE": "5" if reason == "other environment" else "4"}), slot=0)
    assert job is not spare
    assert ended(job) == 0
    assert ended(spare) != 0


def test_no_interpreter_outlives_its_study(executor, monkeypatch):
    monkeypatch.setattr(local, "GRACE", 3.0)  # on a busy machine an interrupted interpreter takes a while to end
    executor.prepare(0, {})
    spare = executor._spares[0]
    # Tests that a shell runs in the background ignore Ctrl-C, and so do the interpreters that they start
    hearing = "import signal, time; signal.signal(2, signal.default_int_handler); print('begun', flush=True)"
    hearing += "; time.sleep(60)"
    deaf = "import signal, time; signal.signal(2, signal.SIG_IGN); print('begun', flush=True); time.sleep(60)"
    polite = executor.submit(Work(hearing), slot=1)
    stubborn = executor.submit(Work(deaf), slot=2)
    deadline = time.monotonic() + 60
    while not polite.stderr() or not stubborn.stderr():
        assert time.monotonic() < deadline, "the interpreters did not begin in a minute"
        time.sleep(0.01)
    executor.__exit__(None, None, None)
    assert ended(spare) == -9
    assert "KeyboardInterrupt" in polite.stderr()
    assert ended(polite) not in (0, -9)
    assert ended(stubborn) == -9


def test_an_interpreter_that_fails_says_why(executor):
    job = executor.submit(Work("raise RuntimeError('no disk')"), slot=0)
    assert ended(job) == 1
    assert "RuntimeError: no disk" in job.stderr()


def test_a_run_has_the_command_line_of_main(tmp_path):
    """In a child, because `run_here` redirects the output of its process."""
    code = """
import sys
from pathlib import Path
from studies.engine.local import run_here
code = run_here(["study", "--nothing"], Path(sys.argv[1]), {"SHARE": "4"})
import os
print(sys.argv[1:], code, os.environ["SHARE"])
"""
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "log.txt")], cwd=local.MAIN.parent, check=True, timeout=120
    )
    shown = (tmp_path / "log.txt").read_text()
    assert shown.startswith("error: the following arguments are required: FILE")
    assert "['study', '--nothing'] 2 4" in shown
