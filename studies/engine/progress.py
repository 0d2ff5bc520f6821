"""What a study shows of its runs while they run, and when they end."""

from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from studies.engine.study import Run, Study

TAIL = 12  # lines of a failed run's log that are shown


class Job(Protocol):
    """An attempt that has been started."""

    def done(self) -> bool:
        """Return whether the attempt has ended."""
        ...

    def stderr(self) -> str | None:
        """Return the errors of the process around the run."""
        ...


def headline_of(study: Study, run: Run) -> str:
    """Return the first measures of a finished run and its duration; an empty string for every other run."""
    if (record := run.result) is None:
        return ""
    known = {name: record["metrics"].get(name) for name in study.measures[:2]}
    shown = [f"{name} {value:.4g}" for name, value in known.items() if value is not None]
    return ", ".join([*shown, f"{sum(record['seconds'].values()):.0f} s"])


def lines_of(path: Path) -> list[str]:
    """Return the lines of a text file that are not blank; none if there is no file."""
    text = path.read_text(errors="replace") if path.exists() else ""
    return [line.strip() for line in text.replace("\r", "\n").splitlines() if line.strip()]


def last_lines(run: Run, job: Job) -> str:
    """Return the end of a failed run's log, or the errors of the process around the run."""
    log = run.folder / "log.txt"
    lines = lines_of(log) or (job.stderr() or "no log").splitlines()
    return "\n".join(f"    {line}" for line in [*lines[-TAIL:], f"log: {log}"])


def progress(runs: Iterable[Run]) -> str:
    """Return the last line in the log of the run that has been running longest."""
    first = next(iter(runs), None)
    if first is None:
        return ""
    line = (lines_of(first.folder / "log.txt") or [""])[-1]
    return f"{first.name}: {line[:70]}"
