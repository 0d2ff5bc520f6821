"""Runs as jobs of SLURM: the warning before the time limit, the next place in the queue, and which jobs are left.

SLURM's warning goes to every process of a job, loader workers included. So it is a signal that processes ignore unless
they ask for it; the process around the run hears it and sends the run, and only the run, the signal to save and to end.
What a job has achieved stands in the run's folder. SLURM is only asked which jobs it still has, because its accounting
(`sacct`) is an option that many clusters lack.
"""

import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, NoReturn

from studies.engine.attempt import MAIN, Attempt, start_main

if TYPE_CHECKING:
    import submitit

WARNING = signal.SIGURG
EARLY = 60  # seconds by which SLURM may warn too early
MAX_NOTICE = 90  # seconds from the warning to the time limit, of which the last quarter is for the requeue
NOTICE_PER_MINUTE = 15  # seconds; less than MAX_NOTICE where the time limit is below six minutes
ASK_EVERY = 5.0  # seconds between two looks at SLURM's queue
# With this job name Lightning takes the job for an interactive shell: it starts the processes of a run on several GPUs
# itself, and leaves the signal before the time limit alone.
ENVIRONMENT = {"SLURM_JOB_NAME": "interactive"}


def notice(minutes: int) -> int:
    """Return how many seconds before a time limit SLURM warns the job."""
    return min(MAX_NOTICE, NOTICE_PER_MINUTE * minutes)


@dataclass
class OnSlurm:
    """An attempt in a job of SLURM. A job that reaches its time limit is queued again if the run got on meanwhile.

    Attributes:
        attempt: The attempt.
        minutes: The time limit.
    """

    attempt: Attempt
    minutes: int
    _end_at: float = field(default=math.inf, init=False)  # when the run is told to save and to end
    _told_to_end: bool = field(default=False, init=False)

    def __call__(self) -> int:
        """Run; return the exit code, unless SLURM ends the job or queues it again."""
        started = time.monotonic()
        signal.signal(WARNING, lambda *_: self._warn(started))
        signal.signal(signal.SIGTERM, self._end)
        before = self.attempt.saved()
        code = self.attempt(self._run)
        if code == 0 or self.attempt.outcome().state == "failed":
            return code
        if time.monotonic() > self._end_at:
            after = self.attempt.saved()
            if after is not None and (before is None or after.step > before.step):
                self._requeue()
            else:
                self.attempt.note("reached its time limit without a step of progress since it began: raise --hours")
        elif self._told_to_end:
            _wait_for_the_end()  # SLURM has another job for the node and will queue this one again, or it was cancelled
        return code

    def _warn(self, started: float) -> None:
        """Plan the end of the run: in time before the limit, or at once if SLURM wants the node for another job."""
        now, planned = time.monotonic(), started + 60 * self.minutes - notice(self.minutes)
        self._end_at = planned if now < planned < now + EARLY else now

    def _end(self, number: int, frame: FrameType | None) -> None:
        self._told_to_end = True  # and so was the run: SLURM sends SIGTERM to every process

    def _run(self, line: list[str], log: Path, environment: dict[str, str]) -> int:
        """Run `main.py` in a new process; have it save and end after the warning."""
        process = start_main(line, log, environment)
        told = False
        while process.poll() is None:
            if not told and time.monotonic() > self._end_at:
                process.send_signal(signal.SIGUSR2)
                told = True
            elif time.monotonic() > self._end_at + 0.75 * notice(self.minutes):
                process.kill()
            time.sleep(0.1)
        return process.returncode

    def _requeue(self) -> None:
        """Have SLURM queue the job again, which ends this process."""
        deadline = time.monotonic() + MAX_NOTICE
        while True:
            done = subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], capture_output=True, text=True)
            if done.returncode == 0:
                sys.exit(1)  # without a result, which would tell submitit that the job is over
            if time.monotonic() > deadline:
                break
            time.sleep(2)  # the controller may be starting
        self.attempt.note(f"reached its time limit, and SLURM did not queue it again: {done.stderr.strip()}")


def _wait_for_the_end() -> NoReturn:
    """Wait until SLURM ends this process: a job that ends by itself would not be queued again."""
    time.sleep(600)
    sys.exit(1)


class Queue:
    """The jobs that SLURM still has."""

    def __init__(self) -> None:
        self._asked_at = -ASK_EVERY
        self._absences: dict[str, int] = {}  # job -> how often in a row it was absent

    def has_left(self, job: str) -> bool:
        """Return whether SLURM has no such job any more; False if SLURM does not answer."""
        self._absences.setdefault(job, 0)
        if time.monotonic() - self._asked_at > ASK_EVERY:
            self._asked_at = time.monotonic()
            if (present := self._ask()) is not None:
                self._absences = {job: 0 if job in present else n + 1 for job, n in self._absences.items()}
        return self._absences[job] > 1  # once may be the moment in which a job is queued again

    @staticmethod
    def _ask() -> set[str] | None:
        line = ["squeue", "--me", "--array", "--noheader", "--format=%i"]
        try:
            return set(subprocess.run(line, capture_output=True, text=True, check=True, timeout=60).stdout.split())
        except (OSError, subprocess.SubprocessError):  # the controller is starting, or too busy
            return None


class SlurmJob:
    """A job of an array.

    Args:
        job: submitit's job, of which only the paths are used: its polling needs SLURM's accounting.
        queue: The jobs that SLURM still has.
    """

    def __init__(self, job: "submitit.Job[int]", queue: Queue):
        self.job, self.queue = job, queue

    def done(self) -> bool:
        """Return whether the attempt has ended, or SLURM no longer has the job."""
        ended: bool = self.job.paths.result_pickle.exists()
        return ended or self.queue.has_left(self.job.job_id)

    def stderr(self) -> str | None:
        """Return the errors of the process around the run."""
        errors: str | None = self.job.stderr()
        return errors


def submit(attempts: Sequence[Attempt], name: str, folder: Path, options: dict[str, Any]) -> list[SlurmJob]:
    """Submit attempts as one job array.

    Args:
        attempts: The attempts.
        name: The job's name.
        folder: Folder of the job scripts and their output.
        options: submitit's parameters of the jobs, such as `slurm_partition`.

    Raises:
        RuntimeError: This machine has no SLURM, or SLURM refuses the job.
    """
    import submitit

    # A checkout that is not installed: jobs import the packages from it
    os.environ["PYTHONPATH"] = os.pathsep.join([str(MAIN.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    minutes = options["slurm_time"]
    own = {"signal": f"{WARNING.name.removeprefix('SIG')}@{notice(minutes)}", "requeue": True}
    executor = submitit.AutoExecutor(folder, cluster="slurm")
    executor.update_parameters(name=name, slurm_additional_parameters=own, **options)
    with executor.batch():
        jobs = [executor.submit(OnSlurm(attempt, minutes)) for attempt in attempts]
    queue = Queue()
    return [SlurmJob(job, queue) for job in jobs]


def cancel(jobs: Sequence[SlurmJob]) -> None:
    """Cancel jobs: each run gets SIGTERM, upon which it saves and ends."""
    arrays = {job.job.job_id.partition("_")[0] for job in jobs}
    subprocess.run(["scancel", *sorted(arrays)], check=False)
