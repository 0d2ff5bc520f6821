"""One attempt at a run, in the process that submitit starts for it; imports little, for that process does little."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from submitit.helpers import DelayedSubmission

MAIN = Path(__file__).resolve().parents[2] / "main.py"
LAST = Path("checkpoints", "last.ckpt")


def read_result(folder: Path) -> dict[str, Any] | None:
    """The `results.json` of a run that came to its end."""
    path = folder / "results.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    return record if record.get("status") == "finished" else None


@dataclass
class Attempt:
    """The ordinary command line in a process of its own, once for each run.

    Attributes:
        command: `fit`, `validate` or `test`.
        config: The resolved config, as YAML.
        folder: The run's folder.
        environment: Variables that the run gets.
    """

    command: str
    config: str
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)

    def __call__(self) -> int:
        """Run, from the last checkpoint of an interrupted attempt if there is one; return the exit code."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with open(self._beside(".lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # an attempt whose study was killed may still be at it: wait for it
            if read_result(self.folder):
                return 0
            checkpoint = self._set_aside()
            self._beside(".yaml").write_text(self.config)
            line = [sys.executable, str(MAIN), self.command, "--config", str(self._beside(".yaml"))]
            line += ["--trainer.default_root_dir", str(self.folder)]
            line += ["--ckpt_path", str(checkpoint)] if checkpoint and self.command == "fit" else []
            environment = {**os.environ, **self.environment}
            with open(self.folder / "log.txt", "w") as log:
                code = subprocess.run(line, stdout=log, stderr=subprocess.STDOUT, env=environment).returncode
            if code == 0:
                shutil.rmtree(self._beside(".interrupted"), ignore_errors=True)
            return code

    def checkpoint(self) -> DelayedSubmission:
        """What submitit does when SLURM is about to take the machine away: queue the same attempt again."""
        return DelayedSubmission(self)

    def _beside(self, suffix: str) -> Path:
        return self.folder.with_name(self.folder.name + suffix)

    def _set_aside(self) -> Path | None:
        """Make the folder new; return the last checkpoint of an interrupted attempt, if it was written to its end."""
        aside = self._beside(".interrupted")
        if _is_intact(self.folder / LAST):
            shutil.rmtree(aside, ignore_errors=True)
            self.folder.rename(aside)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir()
        for curves in [*aside.glob("events.out.tfevents*"), *aside.glob("members.jsonl")]:
            shutil.copy(curves, self.folder)  # so that curves begin where the run began
        return aside / LAST if _is_intact(aside / LAST) else None


def _is_intact(path: Path) -> bool:
    if not path.exists():
        return False
    from lightning_modules.core.checkpoints import is_intact  # brings torch along, and few attempts get here

    return is_intact(path)
