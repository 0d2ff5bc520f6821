"""Runs a study's waves with submitit: on this machine, a few runs at a time, or on SLURM, as one job array per wave."""

import os
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import submitit
from tqdm import tqdm

from datamodules.errors import UserError
from studies.engine.attempt import MAIN, Attempt
from studies.engine.study import Run, Study

TAIL = 12  # lines of a failed run's log that are shown
WEEK = 7 * 24 * 60  # minutes; submitit's default ends local jobs after a few
MAX_REQUEUES = 1000  # times that a run may reach its time limit on SLURM
POLL = {"local": 0.05, "slurm": 0.5}  # seconds; on SLURM a look is at a shared file system
# With this job name Lightning takes the job for an interactive shell: it starts the processes of a run on several GPUs
# itself, and leaves the signal before the time limit to submitit. Otherwise both would answer it.
SLURM = {"SLURM_JOB_NAME": "interactive"}

Job = submitit.Job[int]


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


def execute(study: Study, cluster: Cluster) -> list[Run]:
    """Run every unfinished run, wave by wave; return the runs that failed or had to be left out.

    Ctrl-C interrupts the current runs. The next call continues from their last checkpoints.
    """
    failed: list[Run] = []
    todo = [run for run in study.runs if not run.result]
    finished = len(study.runs) - len(todo)
    if finished:
        print(f"{finished} of {len(study.runs)} runs are already finished")
    if not todo:
        return failed
    # A checkout that is not installed: jobs import this package from it
    os.environ["PYTHONPATH"] = os.pathsep.join([str(MAIN.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
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
                failed += _Wave(study, wave, cluster, bar).run(ready)
    return failed


class _Wave:
    """The execution of one wave.

    Args:
        study: The study.
        wave: The wave's number.
        cluster: Where to run.
        bar: The study's progress bar.
    """

    def __init__(self, study: Study, wave: int, cluster: Cluster, bar: "tqdm[Any]"):
        self.study, self.wave, self.cluster, self.bar = study, wave, cluster, bar
        self.running: dict[Job, Run] = {}
        self.shown = 0.0  # when the bar was last refreshed

    def run(self, runs: list[Run]) -> list[Run]:
        """Execute the runs; return those that failed."""
        try:
            return self._on_slurm(runs) if self.cluster.executor == "slurm" else self._here(runs)
        except BaseException:
            for job in self.running:
                job.cancel(check=False)
            raise

    def _here(self, runs: list[Run]) -> list[Run]:
        """Keep `cluster.jobs` runs going; each slot has its share of the machine."""
        failed: list[Run] = []
        waiting, slots = deque(runs), deque(range(self.cluster.jobs))
        slot_of: dict[Job, int] = {}
        at_once = min(self.cluster.jobs, sum(run.wave == self.wave for run in self.study.runs))
        executor = local_executor(self.study)
        while waiting or self.running:
            while waiting and slots:
                run, slot = waiting.popleft(), slots.popleft()
                with _silent_controllers(self.study):
                    job = executor.submit(_attempt(run, _environment(slot, at_once)))
                self.running[job], slot_of[job] = run, slot
            done = self._done()
            failed += self._report(done)
            slots.extend(slot_of[job] for job in done)
        return failed

    def _on_slurm(self, runs: list[Run]) -> list[Run]:
        failed: list[Run] = []
        self.running = _submit_array(self.study, runs, self.wave, self.cluster)
        while self.running:
            failed += self._report(self._done())
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


def local_executor(study: Study) -> submitit.Executor:
    """Return the executor of jobs on this machine."""
    executor = submitit.AutoExecutor(study.folder / "jobs", cluster="local")
    executor.update_parameters(timeout_min=WEEK)
    return executor


def _attempt(run: Run, environment: dict[str, str]) -> Attempt:
    return Attempt(run.command, run.config, run.folder, environment)


def _submit_array(study: Study, runs: list[Run], wave: int, cluster: Cluster) -> dict[Job, Run]:
    try:
        executor = submitit.AutoExecutor(study.folder / "jobs", cluster="slurm", slurm_max_num_timeout=MAX_REQUEUES)
        parallel = {"slurm_array_parallelism": cluster.jobs or len(runs)}
        executor.update_parameters(name=f"{study.name}-wave{wave}", **parallel, **cluster.options)
        with executor.batch():  # one array
            jobs = [executor.submit(_attempt(run, SLURM)) for run in runs]
    except RuntimeError as error:  # this machine has no SLURM, or SLURM refuses the job
        raise UserError(f"--executor slurm: {error}") from error
    return dict(zip(jobs, runs, strict=True))


@contextmanager
def _silent_controllers(study: Study) -> Iterator[None]:
    """Send the output of the processes that submitit starts to a file: at Ctrl-C each prints a stack trace."""
    terminal = os.dup(2)
    with open(study.folder / "jobs" / "controllers.log", "a") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


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
