"""Running a study's waves by submitit: here, some at a time, or as SLURM job arrays."""

import os
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import submitit
import torch
from tqdm import tqdm

from datamodules.errors import UserError
from studies.engine.attempt import MAIN, Attempt
from studies.engine.study import Run, Study

TAIL = 12  # lines of a failed run's log that are shown
WEEK = 7 * 24 * 60  # minutes: submitit ends local jobs after a few unless told otherwise
MOST_REQUEUES = 1000  # times that a run may meet its time limit on SLURM
POLL = 0.5  # seconds
# Under this name Lightning takes the job for a shell: it starts its own processes where a run has several GPUs, and
# leaves the signal before the time limit to submitit, which would else be answered by both.
SLURM = {"SLURM_JOB_NAME": "interactive"}


@dataclass
class Cluster:
    """Where and how runs are executed.

    Attributes:
        executor: `local`, or `slurm` for a job array a wave.
        jobs: How many runs at a time; on SLURM, 0 means all.
        options: submitit's parameters of a SLURM job, such as `slurm_partition`.
    """

    executor: Literal["local", "slurm"] = "local"
    jobs: int = 1
    options: dict[str, Any] = field(default_factory=dict)


def execute(study: Study, cluster: Cluster) -> list[Run]:
    """Run what is not finished yet, wave by wave, and return the runs that failed or had to be left out.

    Ctrl-C ends the running ones; calling again goes on from there.
    """
    failed: list[Run] = []
    todo = [run for run in study.runs if not run.result]
    kept = len(study.runs) - len(todo)
    if kept:
        print(f"{kept} of {len(study.runs)} runs are finished already")
    if not todo:
        return failed
    # Jobs find this package in a checkout that is not installed, too
    os.environ["PYTHONPATH"] = os.pathsep.join([str(MAIN.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    interval = 0.5 if sys.stderr.isatty() else 30  # in a log file every refresh is a line of its own
    with tqdm(total=len(todo), unit="run", dynamic_ncols=True, mininterval=interval) as bar:
        for wave in sorted({run.wave for run in todo}):
            lost = {(run.arm, run.seed) for run in failed}
            ready = []
            for run in (run for run in todo if run.wave == wave):
                if missing := sorted(arm for arm in run.needs if (arm, run.seed) in lost):
                    bar.write(f"left out: {run.name}, for {' and '.join(missing)} failed")
                    failed.append(run)
                else:
                    ready.append(run)
            size = sum(run.wave == wave for run in study.runs)
            failed += _run_wave(study, ready, size, wave, cluster, bar)
    return failed


def _run_wave(study: Study, runs: list[Run], size: int, wave: int, cluster: Cluster, bar: tqdm) -> list[Run]:
    failed: list[Run] = []
    waiting, running, shown = deque(runs), {}, 0.0
    try:
        if cluster.executor == "slurm" and runs:
            running = _submit_array(study, runs, wave, cluster)
            waiting.clear()
        else:
            executor = submitit.AutoExecutor(study.folder / "jobs", cluster="local")
            executor.update_parameters(timeout_min=WEEK)
        slots = deque(range(cluster.jobs))
        slot_of: dict[str, int] = {}
        while waiting or running:
            while waiting and slots:
                run, slot = waiting.popleft(), slots.popleft()
                with _silent_controllers(study):
                    job = executor.submit(_attempt(run, _environment(slot, min(cluster.jobs, size))))
                running[job], slot_of[job.job_id] = run, slot
            for job in [job for job in running if job.done()]:
                run = running.pop(job)
                if cluster.executor == "local":
                    slots.append(slot_of.pop(job.job_id))
                if run.result:
                    bar.write(f"finished: {run.name}, {_headline(study, run)}")
                else:
                    failed.append(run)
                    bar.write(f"FAILED: {run.name}\n{_last_lines(run, job)}")
                bar.update()
            if time.monotonic() - shown > bar.mininterval:
                bar.set_postfix_str(_what_runs(running.values()))
                shown = time.monotonic()
            time.sleep(POLL)
    except BaseException:
        for job in running:
            job.cancel(check=False)
        raise
    return failed


def _attempt(run: Run, environment: dict[str, str]) -> Attempt:
    return Attempt(run.command, run.config, run.folder, environment)


def _submit_array(study: Study, runs: list[Run], wave: int, cluster: Cluster) -> dict[submitit.Job, Run]:
    try:
        executor = submitit.AutoExecutor(study.folder / "jobs", cluster="slurm", slurm_max_num_timeout=MOST_REQUEUES)
        parallel = {"slurm_array_parallelism": cluster.jobs or len(runs)}
        executor.update_parameters(name=f"{study.name}-wave{wave}", **parallel, **cluster.options)
        with executor.batch():  # one array
            jobs = [executor.submit(_attempt(run, SLURM)) for run in runs]
    except RuntimeError as error:  # no SLURM here, or it refuses
        raise UserError(f"SLURM: {error}") from error
    return dict(zip(jobs, runs, strict=True))


@contextmanager
def _silent_controllers(study: Study) -> Iterator[None]:
    """Have the processes that submitit starts in this block write elsewhere: at Ctrl-C each shows a stack trace."""
    terminal = os.dup(2)
    with open(study.folder / "jobs" / "controllers.log", "a") as file:
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def _environment(slot: int, at_once: int) -> dict[str, str]:
    """Share this machine: threads among the runs at once, and a GPU each by turns.

    The number of threads follows from the study alone, not from what is left to do, so that a study that was
    interrupted gives the same sums.
    """
    threads = max(1, (os.cpu_count() or 1) // at_once)
    shared = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(threads)), "TOKENIZERS_PARALLELISM": "false"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible else [str(device) for device in range(torch.cuda.device_count())]
    return shared | ({"CUDA_VISIBLE_DEVICES": devices[slot % len(devices)]} if devices else {})


def _headline(study: Study, run: Run) -> str:
    metrics = run.result["metrics"]
    shown = [f"{name} {metrics[name]:.4g}" for name in study.measures[:2] if metrics.get(name) is not None]
    return ", ".join([*shown, f"{sum(run.result['seconds'].values()):.0f} s"])


def _log(run: Run) -> list[str]:
    path = run.folder / "log.txt"
    text = path.read_text(errors="replace") if path.exists() else ""
    return [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]


def _last_lines(run: Run, job: submitit.Job) -> str:
    lines = _log(run) or (job.stderr() or "it left no log").splitlines()
    return "\n".join(f"    {line}" for line in [*lines[-TAIL:], f"log: {run.folder / 'log.txt'}"])


def _what_runs(runs: Any) -> str:
    """What the longest-running one says."""
    first = next(iter(runs), None)
    if first is None:
        return ""
    line = (_log(first) or [""])[-1]
    return f"{first.name}: {line[:70]}"
