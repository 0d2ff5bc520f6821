"""Spare interpreters: when one is used, when it is replaced, and that none outlives its study."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

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
    begin = "import signal, time; signal.signal(15, {}); print('begun', flush=True); time.sleep(60)"
    hearing, deaf = begin.format("lambda *_: exec('raise SystemExit(143)')"), begin.format("signal.SIG_IGN")
    polite = executor.submit(Work(hearing), slot=1)
    stubborn = executor.submit(Work(deaf), slot=2)
    deadline = time.monotonic() + 60
    while not polite.stderr() or not stubborn.stderr():
        assert time.monotonic() < deadline, "the interpreters did not begin in a minute"
        time.sleep(0.01)
    executor.__exit__(None, None, None)
    assert ended(spare) == -9
    assert ended(polite) == 143
    assert ended(stubborn) == -9


def test_what_a_run_has_started_ends_with_it(executor, tmp_path):
    """A rank or a loader worker that does not hear SIGTERM."""
    start = "import subprocess, time; child = subprocess.Popen(['sleep', '60']); "
    code = start + f"open({str(tmp_path / 'child')!r}, 'w').write(f'{{child.pid}}\\n'); time.sleep(60)"
    executor.submit(Work(code), slot=0)
    executor.submit(
        Work("import signal; signal.signal(15, signal.SIG_IGN); " + code.replace("child'", "deaf'")), slot=1
    )
    deadline = time.monotonic() + 60
    files = [tmp_path / "child", tmp_path / "deaf"]
    while not all(file.exists() and file.read_text().endswith("\n") for file in files):
        assert time.monotonic() < deadline, "the interpreters did not begin in a minute"
        time.sleep(0.01)
    executor.__exit__(None, None, None)
    for child in (int(file.read_text()) for file in files):
        while is_running(child):
            assert time.monotonic() < deadline, "a child has outlived its run"
            time.sleep(0.01)


def is_running(process):
    """Whether a process is there and no zombie."""
    status = Path(f"/proc/{process}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


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
    assert shown.startswith("error: there is no option --nothing")
    assert "['study', '--nothing'] 2 4" in shown
