"""One attempt at a run; imports little, because submitit's process on SLURM only waits for the run."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NotRequired, TypedDict

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission

MAIN = Path(__file__).resolve().parents[2] / "main.py"
LAST = Path("checkpoints", "last.ckpt")
RunMain = Callable[[list[str], Path, dict[str, str]], int]  # command line, log, environment -> exit code


class GitState(TypedDict):
    """The revision of the code that made a run, and whether the checkout had other changes."""

    revision: str | None
    dirty: bool | None


class Record(TypedDict):
    """What a study reads of a run's `results.json`; `RunRecord` writes it.

    Attributes:
        status: `finished` for a run that came to its end.
        seconds: Stage -> duration.
        metrics: Name -> value; null where the run has no finite value.
        intervals: Name -> 95 % interval over the run's test samples.
        n: Name -> number of samples behind the measure.
        hits: Name of a proportion -> number of hits for each ensemble member (one for an ordinary run).
        members: Of an ensemble: name -> value for each member, in the order of their seeds.
        git: The revision of the code.
    """

    status: str
    seconds: dict[str, float]
    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float | None, float | None]]
    n: dict[str, int]
    hits: NotRequired[dict[str, list[int]]]  # absent from records of earlier revisions
    members: NotRequired[dict[str, list[float | None]]]
    git: GitState


def read_result(folder: Path) -> Record | None:
    """Return the `results.json` of a run that came to its end; None for every other run."""
    path = folder / "results.json"
    record: Record | None = json.loads(path.read_text()) if path.exists() else None
    return record if record and record.get("status") == "finished" else None


@dataclass
class Attempt:
    """Runs the ordinary command line for one run of a study.

    Attributes:
        command: `fit`, `validate` or `test`.
        config: The resolved config, as YAML.
        folder: The run's folder.
        environment: Environment variables of the run.
    """

    command: str
    config: str
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self, run: RunMain | None = None) -> int:
        """Run, from the last checkpoint of an interrupted attempt if there is one.

        Args:
            run: Runs the command line; None means in a new process.

        Returns:
            The exit code.
        """
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(self._beside(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # an attempt of a study that was killed may still run: wait for it
            if read_result(self.folder):
                return 0
            checkpoint = self._set_aside()
            self._beside(".yaml").write_text(self.config)
            line = [self.command, "--config", str(self._beside(".yaml"))]
            line += ["--trainer.default_root_dir", str(self.folder)]
            line += ["--ckpt_path", str(checkpoint)] if checkpoint and self.command == "fit" else []
            code = (run or run_main)(line, self.folder / "log.txt", self.environment)
            if code == 0:
                shutil.rmtree(self._beside(".interrupted"), ignore_errors=True)
            return code

    def checkpoint(self) -> "DelayedSubmission":
        """Return the same attempt for submitit to queue again; submitit calls this before SLURM ends the job."""
        from submitit.helpers import DelayedSubmission  # `study` needs this module, and submitit only to run

        return DelayedSubmission(self)

    def _beside(self, suffix: str) -> Path:
        return self.folder.with_name(self.folder.name + suffix)

    def _set_aside(self) -> Path | None:
        """Empty the folder; return the last checkpoint of an interrupted attempt, if it is intact."""
        aside = self._beside(".interrupted")
        if _is_intact(self.folder / LAST):
            shutil.rmtree(aside, ignore_errors=True)
            self.folder.rename(aside)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for curves in [*aside.glob("events.out.tfevents*"), *aside.glob("members.jsonl")]:
            shutil.copy(curves, self.folder)  # so that curves begin where the run began
        return aside / LAST if _is_intact(aside / LAST) else None


def run_main(line: list[str], log: Path, environment: dict[str, str]) -> int:
    """Run `main.py` with a command line in a new process, its output in a file; return the exit code."""
    with open(log, "w") as output:
        command = [sys.executable, str(MAIN), *line]
        variables = {**os.environ, **environment}
        return subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=variables).returncode


def _is_intact(path: Path) -> bool:
    if not path.exists():
        return False
    from lightning_modules.core.checkpoints import is_intact  # imports torch, which most attempts do not need

    return is_intact(path)
