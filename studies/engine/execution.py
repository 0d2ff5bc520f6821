"""Runs a study's waves: on this machine, a few runs at a time, or on SLURM, as one job array per wave."""

import os
import sys
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from tqdm import tqdm

from datamodules.errors import UserError
from studies.engine.attempt import MAIN, Attempt
from studies.engine.local import LocalExecutor
from studies.engine.study import Run, Study

if TYPE_CHECKING:
    import submitit

TAIL = 12  # lines of a failed run's log that are shown
MAX_REQUEUES = 1000  # times that a run may reach its time limit on SLURM
POLL = {"local": 0.05, "slurm": 0.5}  # seconds; on SLURM every look goes to a shared file system
# With this job name Lightning takes the job for an interactive shell: it starts the processes of a run on several GPUs
# itself, and leaves the signal before the time limit to submitit. Otherwise both would answer it.
SLURM = {"SLURM_JOB_NAME": "interactive"}


class Job(Protocol):
    """An attempt that has been started."""

    def done(self) -> bool:
        """Return whether the attempt has ended."""
        ...

    def stderr(self) -> str | None:
        """Return the errors of the process around the run."""
        ...


@dataclass
class Cluster:
    """Where and how runs are executed.

    Attributes:
        executor: `local`, or `slurm` for one job array per wave.
        jobs: Number of simultaneous runs; on SLURM, 0 means all.
        options: submitit's parameters of a SLURM job, such as `slurm_partition`.
    """

    executor: Literal["local", "slurm"] = "local"
    jobs: int = 1
    options: dict[str, Any] = field(default_factory=dict)


def prepare(executor: LocalExecutor, cluster: Cluster) -> None:
    """Start the interpreter of the first run on this machine; it imports while the study is checked."""
    if cluster.executor == "local":
        executor.prepare(0, _environment(0, cluster.jobs))


def execute(study: Study, cluster: Cluster, executor: LocalExecutor) -> list[Run]:
    """Run every unfinished run, wave by wave; return the runs that failed or had to be left out.

    Args:
        study: The study.
        cluster: Where to run.
        executor: Runs attempts on this machine. When the caller leaves its context, it interrupts those that still
            run; they continue from their last checkpoints in the next execution.
    """
    failed: list[Run] = []
    todo = [run for run in study.runs if not run.result]
    finished = len(study.runs) - len(todo)
    if finished:
        print(f"{finished} of {len(study.runs)} runs are already finished")
    if not todo:
        return failed
    interval = 0.5 if sys.stderr.isatty() else 30  # in a log file every refresh is a new line
    with tqdm(total=len(todo), unit="run", dynamic_ncols=True, mininterval=interval) as bar:
        for wave in sorted({run.wave for run in todo}):
            lost = {(run.arm, run.seed) for run in failed}
            ready = []
            for run in (run for run in todo if run.wave == wave):
                if missing := sorted(arm for arm in run.needs if (arm, run.seed) in lost):
                    bar.write(f"left out: {run.name}, because {' and '.join(missing)} failed")
                    failed.append(run)
                else:
                    ready.append(run)
            if ready:
                later = [run for run in todo if run.wave > wave]
                failed += _Wave(study, cluster, executor, bar).run(ready, later)
    return failed


class _Wave:
    """The execution of one wave.

    Args:
        study: The study.
        cluster: Where to run.
        executor: Runs attempts on this machine.
        bar: The study's progress bar.
    """

    def __init__(self, study: Study, cluster: Cluster, executor: LocalExecutor, bar: "tqdm[Any]"):
        self.study, self.cluster, self.executor, self.bar = study, cluster, executor, bar
        self.running: dict[Job, Run] = {}
        self.shown = 0.0  # when the bar was last refreshed

    def run(self, runs: list[Run], later: list[Run]) -> list[Run]:
        """Execute the runs; return those that failed.

        Args:
            runs: The unfinished runs of the wave.
            later: The unfinished runs of later waves.
        """
        return self._on_slurm(runs) if self.cluster.executor == "slurm" else self._here(runs, later)

    def _here(self, runs: list[Run], later: list[Run]) -> list[Run]:
        """Keep `cluster.jobs` runs going; each slot has its share of the machine."""
        failed: list[Run] = []
        waiting, slots = deque(runs), deque(range(self.cluster.jobs))
        slot_of: dict[Job, int] = {}
        while waiting or self.running:
            while waiting and slots:
                run, slot = waiting.popleft(), slots.popleft()
                job = self.executor.submit(_attempt(run, self._share(slot, run)), slot)
                self.running[job], slot_of[job] = run, slot
                for following in [*waiting, *later][self.executor.spares :][:1]:
                    self.executor.prepare(slot, self._share(slot, following))
            done = self._done()
            failed += self._report(done)
            slots.extend(slot_of[job] for job in done)
        return failed

    def _share(self, slot: int, run: Run) -> dict[str, str]:
        """Return the environment of a run in a slot."""
        return _environment(slot, min(self.cluster.jobs, sum(other.wave == run.wave for other in self.study.runs)))

    def _on_slurm(self, runs: list[Run]) -> list[Run]:
        failed: list[Run] = []
        jobs = _submit_array(self.study, runs, self.cluster)
        self.running = dict(zip(jobs, runs, strict=True))
        try:
            while self.running:
                failed += self._report(self._done())
        except BaseException:
            for job in jobs:
                job.cancel(check=False)
            raise
        return failed

    def _done(self) -> dict[Job, Run]:
        """Return the jobs that have ended; wait a moment if none has."""
        done = {job: run for job, run in self.running.items() if job.done()}
        self.running = {job: run for job, run in self.running.items() if job not in done}
        if time.monotonic() - self.shown > self.bar.mininterval:
            self.bar.set_postfix_str(_progress(self.running.values()))
            self.shown = time.monotonic()
        if not done:
            time.sleep(POLL[self.cluster.executor])
        return done

    def _report(self, done: dict[Job, Run]) -> list[Run]:
        """Write a line on each run that has ended; return those that failed."""
        failed = []
        for job, run in done.items():
            if headline := _headline(self.study, run):
                self.bar.write(f"finished: {run.name}, {headline}")
            else:
                failed.append(run)
                self.bar.write(f"FAILED: {run.name}\n{_last_lines(run, job)}")
            self.bar.update()
        return failed


def _attempt(run: Run, environment: dict[str, str]) -> Attempt:
    return Attempt(run.command, run.config, run.folder, environment)


def _submit_array(study: Study, runs: list[Run], cluster: Cluster) -> "list[submitit.Job[int]]":
    """Submit the runs of a wave as one job array."""
    import submitit

    # A checkout that is not installed: jobs import the packages from it
    os.environ["PYTHONPATH"] = os.pathsep.join([str(MAIN.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    try:
        executor = submitit.AutoExecutor(study.folder / "jobs", cluster="slurm", slurm_max_num_timeout=MAX_REQUEUES)
        parallel = {"slurm_array_parallelism": cluster.jobs or len(runs)}
        executor.update_parameters(name=f"{study.name}-wave{runs[0].wave}", **parallel, **cluster.options)
        with executor.batch():
            return [executor.submit(_attempt(run, SLURM)) for run in runs]
    except RuntimeError as error:  # this machine has no SLURM, or SLURM refuses the job
        raise UserError(f"--executor slurm: {error}") from error


def _environment(slot: int, at_once: int) -> dict[str, str]:
    """Divide this machine among simultaneous runs: threads in equal parts, and GPUs by turns.

    The number of threads follows from the study alone, not from the runs that are left, so that an interrupted study
    adds floating-point numbers in the same order.
    """
    import torch  # not needed by the jobs that import this module

    threads = max(1, (os.cpu_count() or 1) // at_once)
    shared = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), "TOKENIZERS_PARALLELISM": "false"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(device) for device in range(torch.cuda.device_count())]
    return shared | ({"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {})


def _headline(study: Study, run: Run) -> str:
    """Return the first measures of a finished run and its duration; an empty string for every other run."""
    if (record := run.result) is None:
        return ""
    known = {name: record["metrics"].get(name) for name in study.measures[:2]}
    shown = [f"{name} {value:.4g}" for name, value in known.items() if value is not None]
    return ", ".join([*shown, f"{sum(record['seconds'].values()):.0f} s"])


def _log(run: Run) -> list[str]:
    path = run.folder / "log.txt"
    text = path.read_text(errors="replace") if path.exists() else ""
    return [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]


def _last_lines(run: Run, job: Job) -> str:
    lines = _log(run) or (job.stderr() or "no log").splitlines()
    return "\n".join(f"    {line}" for line in [*lines[-TAIL:], f"log: {run.folder / 'log.txt'}"])


def _progress(runs: Iterable[Run]) -> str:
    """Return the last line in the log of the run that has been running longest."""
    first = next(iter(runs), None)
    if first is None:
        return ""
    line = (_log(first) or [""])[-1]
    return f"{first.name}: {line[:70]}"
