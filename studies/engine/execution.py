"""Runs a study's waves: on this machine, a few runs at a time, or on SLURM, as one job array per wave."""

import os
import sys
import time
from collections import deque
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal

from tqdm import tqdm

from datamodules.errors import UserError
from studies.engine import slurm
from studies.engine.attempt import NOTES, Attempt, remove_aside
from studies.engine.local import LocalExecutor
from studies.engine.progress import Job, headline_of, last_lines, lines_of, progress
from studies.engine.study import Run, Study
from studies.engine.study_file import StudyFile, first_wave

POLL = {"local": 0.05, "slurm": 0.5}  # seconds; on SLURM every look goes to a shared file system


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


def prepare(executor: LocalExecutor, cluster: Cluster, file: StudyFile) -> None:
    """Start the interpreter of the first run on this machine; it imports while the study is checked."""
    if cluster.executor == "local":
        executor.prepare(0, _environment(0, min(cluster.jobs, first_wave(file))))


def execute(study: Study, cluster: Cluster, executor: LocalExecutor) -> list[Run]:
    """Run every run that has not come to its end, wave by wave; return the runs that failed.

    A run is left out if it needs files of a run that failed, in which case it counts as failed, or of a run that
    diverged.

    Args:
        study: The study.
        cluster: Where to run.
        executor: Runs attempts on this machine. When the caller leaves its context, it interrupts those that still
            run; they continue from their last checkpoints in the next execution.
    """
    todo = _unfinished(study)
    if not todo:
        return []
    failed: list[Run] = []
    left_out: list[Run] = []
    interval = 0.5 if sys.stderr.isatty() else 30  # in a log file every refresh is a new line
    with tqdm(total=len(todo), unit="run", dynamic_ncols=True, mininterval=interval) as bar:
        for wave, runs in groupby(study.runs, lambda run: run.wave):
            ready = []
            for run in (run for run in runs if not run.outcome.record):
                if run not in todo:  # what it used has changed with this execution
                    bar.total = (bar.total or 0) + 1
                if lost := [(other, fate) for other in study.needed(run) if (fate := _fate(other, failed, left_out))]:
                    bar.write(f"left out: {run.name}, because {' and '.join(f'{a.arm} {fate}' for a, fate in lost)}")
                    (failed if any(other in failed for other, _ in lost) else left_out).append(run)
                else:
                    ready.append(run)
            if ready:
                later = [run for run in todo if run.wave > wave]
                failed += _Wave(study, cluster, executor, bar).run(ready, later)
    return failed


def _unfinished(study: Study) -> list[Run]:
    """Return the runs that have not come to their end; tell how many have, and which only seem to."""
    todo = []
    for run in study.runs:
        found = run.outcome
        if found.record:
            remove_aside(run.folder)  # the last execution may have been killed before it did
        else:
            todo.append(run)
        if found.damage:
            print(f"not finished: {run.name}: {found.damage}")
    diverged = sum(run.divergence is not None for run in study.runs)
    if finished := len(study.runs) - len(todo) - diverged:
        print(f"{finished} of {len(study.runs)} runs are already finished")
    if diverged:
        print(f"{diverged} of {len(study.runs)} runs have diverged")
    return todo


def _fate(run: Run, failed: list[Run], left_out: list[Run]) -> str:
    """Return why the files of a run cannot be used; an empty string if they can."""
    if run.divergence:
        return "diverged"
    return "failed" if run in failed else "was left out" if run in left_out else ""


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
        attempts = [_attempt(run, slurm.ENVIRONMENT) for run in runs]
        options = {"slurm_array_parallelism": self.cluster.jobs or len(runs), **self.cluster.options}
        try:
            jobs = slurm.submit(attempts, f"{self.study.name}-wave{runs[0].wave}", self.study.folder / "jobs", options)
        except RuntimeError as error:  # this machine has no SLURM, or SLURM refuses the job
            raise UserError(f"--executor slurm: {error}") from error
        self.running = dict(zip(jobs, runs, strict=True))
        try:
            while self.running:
                failed += self._report(self._done())
        except BaseException:
            slurm.cancel(jobs)
            raise
        return failed

    def _done(self) -> dict[Job, Run]:
        """Return the jobs that have ended; wait a moment if none has."""
        done = {job: run for job, run in self.running.items() if job.done()}
        self.running = {job: run for job, run in self.running.items() if job not in done}
        if time.monotonic() - self.shown > self.bar.mininterval:
            self.bar.set_postfix_str(progress(self.running.values()))
            self.shown = time.monotonic()
        if not done:
            time.sleep(POLL[self.cluster.executor])
        return done

    def _report(self, done: dict[Job, Run]) -> list[Run]:
        """Write a line on each run that has ended; return those that failed."""
        failed = []
        for job, run in done.items():
            for note in lines_of(run.folder / NOTES):
                self.bar.write(f"{run.name}: {note}")
            if headline := headline_of(self.study, run):
                self.bar.write(f"finished: {run.name}, {headline}")
            elif diverged := run.divergence:
                self.bar.write(f"DIVERGED: {run.name}, at step {diverged.get('step')}")
            else:
                failed.append(run)
                why = run.outcome.damage or run.outcome.state
                self.bar.write(f"FAILED: {run.name}{f' ({why})' if why else ''}\n{last_lines(run, job)}")
            self.bar.update()
        return failed


def _attempt(run: Run, environment: dict[str, str]) -> Attempt:
    return Attempt(run.command, run.config, run.folder, environment, run.leaves, run.uses)


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
