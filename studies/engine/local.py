"""Runs on this machine, in interpreters that import the program before they are needed.

The imports take several seconds, longer than everything else before the first step of a run. So an interpreter starts
while the study is still being checked, or while an earlier run uses the slot, and then waits for its attempt.
"""

import os
import pickle
import runpy
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from subprocess import PIPE, Popen
from types import TracebackType
from typing import IO

from studies.engine.attempt import MAIN, Attempt
from studies.engine.resolver import import_program

PACKAGES = ("callbacks", "cli", "datamodules", "kernels", "lightning_modules", "studies")
WAIT = "from studies.engine.local import wait_for_attempt; wait_for_attempt()"
GRACE = 30.0  # seconds that an interrupted run has to save and to end; a run allows its last step 20


class LocalJob:
    """An interpreter for one attempt.

    Args:
        environment: Environment variables of the run.
    """

    def __init__(self, environment: dict[str, str]):
        self.environment = environment
        self.started = time.time()
        self._output: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115  (open as long as the job)
        # A checkout that is not installed: the interpreter imports the packages from it
        path = os.pathsep.join([str(MAIN.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
        self.process = Popen(
            [sys.executable, "-P", "-c", WAIT],  # -P: packages in the working directory must not shadow the checkout's
            stdin=PIPE,
            stdout=self._output,
            stderr=self._output,
            env={**os.environ, "PYTHONPATH": path, **environment},
            process_group=0,  # of its own: Ctrl-C reaches the study alone, and `kill` reaches ranks and workers too
        )

    def begin(self, attempt: Attempt) -> None:
        """Have the interpreter run an attempt."""
        assert self.process.stdin is not None  # it is a pipe
        with suppress(BrokenPipeError), self.process.stdin as pipe:  # broken if it has ended: `stderr` says why
            pipe.write(pickle.dumps(attempt))

    def done(self) -> bool:
        """Return whether the interpreter has ended."""
        return self.process.poll() is not None

    def kill(self) -> None:
        """End the interpreter and every process that it has started, at once."""
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)

    def stderr(self) -> str:
        """Return what the interpreter wrote before the run began; the run itself writes to `log.txt`."""
        self._output.seek(0)
        return self._output.read().decode(errors="replace")

    def is_current(self) -> bool:
        """Return whether the code that the interpreter imported is still the code on disk."""
        files = [MAIN, *(file for name in PACKAGES for file in (MAIN.parent / name).rglob("*.py"))]
        return all(file.stat().st_mtime < self.started for file in files)


class LocalExecutor:
    """Runs attempts in slots of this machine; a slot may hold a spare interpreter for its next attempt.

    Leaving the context ends the spares, and interrupts attempts that are still running: each gets SIGTERM, upon which a
    run saves a checkpoint, and is killed if it has not ended in time.
    """

    def __init__(self) -> None:
        self._spares: dict[int, LocalJob] = {}
        self._running: list[LocalJob] = []

    def __enter__(self) -> "LocalExecutor":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for spare in self._spares.values():
            spare.kill()
        running = [job for job in self._running if not job.done()]
        for job in running:
            job.process.terminate()
        deadline = time.monotonic() + GRACE
        while time.monotonic() < deadline and not all(job.done() for job in running):
            time.sleep(0.05)
        for job in running:
            job.kill()  # also where the run has ended: a rank or a worker may not have

    def kill(self) -> None:
        """End every interpreter at once, with the processes that it has started."""
        for job in [*self._spares.values(), *self._running]:
            if not job.done():  # else the number of its group may be another's by now
                job.kill()

    def prepare(self, slot: int, environment: dict[str, str]) -> None:
        """Start a spare interpreter for the next attempt in a slot, unless the slot has one."""
        if slot not in self._spares:
            self._spares[slot] = LocalJob(environment)

    def submit(self, attempt: Attempt, slot: int) -> LocalJob:
        """Start an attempt, in the spare interpreter of the slot if that has the environment and the current code."""
        job = self._spares.pop(slot, None)
        if job and (job.done() or job.environment != attempt.environment or not job.is_current()):
            job.kill()
            job = None
        job = job or LocalJob(attempt.environment)
        self._running.append(job)
        job.begin(attempt)
        return job

    @property
    def spares(self) -> int:
        """Number of spare interpreters."""
        return len(self._spares)


def wait_for_attempt() -> None:
    """Import the program, then run the attempt that arrives on stdin; end if none does."""
    import_program()
    if message := sys.stdin.buffer.read():  # nothing: the study has ended
        attempt: Attempt = pickle.loads(message)
        sys.exit(attempt(run_here))


def run_here(line: list[str], log: Path, environment: dict[str, str]) -> int:
    """Run `main.py` with a command line in this interpreter, its output in a file; return the exit code."""
    os.environ.update(environment)
    with open(log, "w") as output:
        for stream in (1, 2):
            os.dup2(output.fileno(), stream)
    sys.argv = [str(MAIN), *line]  # from which Lightning starts the other processes of a run on several GPUs
    try:
        runpy.run_path(str(MAIN), run_name="__main__")
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    return 0
