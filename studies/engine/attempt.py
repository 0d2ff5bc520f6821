"""One attempt at a run; imports little, because submitit's process on SLURM only waits for the run."""

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from studies.engine.outcome import Outcome, beside, changed_files, outcome, remember_files
from studies.engine.products import LAST, Saved, found, newest, saved_step
from studies.engine.records import Damaged

MAIN = Path(__file__).resolve().parents[2] / "main.py"
NOTES = "notes.txt"  # in the run's folder: what an attempt has to say to the user
RunMain = Callable[[list[str], Path, dict[str, str]], int]  # command line, log, environment -> exit code


@dataclass
class Attempt:
    """Runs the ordinary command line for one run of a study.

    The run has two folders: its own, and one with the suffix `.interrupted` for the attempt before. At every moment one
    of them has the last whole checkpoint.

    Attributes:
        command: `fit`, `validate` or `test`.
        config: The resolved config, as YAML.
        folder: The run's folder.
        environment: Environment variables of the run.
        leaves: Files in the folder that other runs need.
        uses: Files of other runs that the run uses.
    """

    command: str
    config: str
    folder: Path
    environment: dict[str, str] = field(default_factory=dict)
    leaves: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()

    def __call__(self, run: RunMain | None = None) -> int:
        """Run, from the last checkpoint of an interrupted attempt if there is one.

        Args:
            run: Runs the command line; None means in a new process.

        Returns:
            0 if the run has come to its end, by its results; else the exit code, or 1 if that is 0.
        """
        try:
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            lock = open(beside(self.folder, ".lock"), "w")  # noqa: SIM115  (the next block closes it)
        except OSError as error:
            return self._refuse(error)
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # an attempt of a study that was killed may still run: wait for it
            if self.outcome().record:
                return 0
            try:
                line = self._prepare()
            except OSError as error:
                return self._refuse(error)
            code = (run or run_main)(line, self.folder / "log.txt", self.environment)
            if self.outcome().record:
                remove_aside(self.folder)
                return 0
            return code or 1

    def _prepare(self) -> list[str]:
        """Make the run's folder and its config; return the command line."""
        checkpoint = self._make_folder()
        line = [self.command, "--config", str(self._write_config())]
        line += ["--trainer.default_root_dir", str(self.folder)]
        return line + (["--ckpt_path", str(checkpoint)] if checkpoint else [])

    def _refuse(self, error: OSError) -> int:
        """Say why the run cannot begin, such as a full disk; return the exit code."""
        sys.stderr.write(f"error: cannot prepare the folder {self.folder}: {error}\n")
        return 1

    def outcome(self) -> Outcome:
        """Return how the run stands."""
        return outcome(self.folder, self.leaves, self.uses)

    def saved(self) -> Saved | None:
        """Return the newest checkpoint from which the run can continue."""
        both = [saved for folder in (self.folder, beside(self.folder, ".interrupted")) if (saved := newest(folder))]
        return max(both, key=lambda saved: saved.step, default=None)  # of equal ones, that of the run's own folder

    def note(self, sentence: str) -> None:
        """Add a line to what the study tells about this run."""
        with open(self.folder / NOTES, "a") as file:
            file.write(sentence + "\n")

    def _make_folder(self) -> Path | None:
        """Make an empty folder for the run; return the checkpoint from which it continues."""
        aside = beside(self.folder, ".interrupted")
        checkpoint = None
        if changed := self._changed():
            note = f"begins anew, because {changed}"
            _put_away(self.folder, self.folder)
            _put_away(aside, self.folder)
        else:
            checkpoint, note = self._set_aside(aside)
        self.folder.mkdir()
        for curves in aside.glob("events.out.tfevents*"):
            shutil.copy(curves, self.folder)  # so that curves begin where the run began
        if (members := aside / "members.jsonl").exists():
            _copy_lines(members, self.folder)
        if note:
            self.note(note)
        if self.uses:
            remember_files(self.folder, self.uses)
        return checkpoint

    def _changed(self) -> str:
        """Return why a checkpoint of an earlier attempt is of no use, in words; an empty string if it is."""
        try:
            changed = changed_files(self.folder, self.uses)
        except Damaged as error:
            return str(error)
        return f"{changed[0]} has changed since the last attempt used it" if changed else ""

    def _set_aside(self, aside: Path) -> tuple[Path | None, str]:
        """Leave the newest whole checkpoint in the folder aside, and nothing in the run's own folder.

        Returns:
            The checkpoint, and a sentence if it is not the one that the last attempt wrote last.
        """
        saved = self.saved() if self.command == "fit" else None
        if saved is None:
            lost = [*found(self.folder), *found(aside)] if self.command == "fit" else []
            _put_away(self.folder, self.folder)
            _put_away(aside, self.folder)
            return None, f"begins anew, because it cannot continue from {lost[0]}" if lost else ""
        place = self.folder if saved.path.is_relative_to(self.folder) else aside
        damaged = [path for path in (self.folder / LAST, place / LAST) if path.exists() and saved_step(path) is None]
        note = f"{damaged[0]} is damaged: continues from {saved.path.name}, step {saved.step}" if damaged else ""
        if place == self.folder:
            _remove(aside)
            self.folder.rename(aside)
        else:
            _put_away(self.folder, self.folder)  # a checkpoint in it that cannot be read now may be newer
        return aside / saved.path.relative_to(place), note

    def _write_config(self) -> Path:
        from lightning_modules.core.files import replacing

        path = beside(self.folder, ".yaml")
        with replacing(path) as draft:
            draft.write_text(self.config, encoding="utf-8")
        return path


def remove_aside(folder: Path) -> None:
    """Remove what the attempt before has left, unless it has a newer checkpoint than the run's folder."""
    aside = beside(folder, ".interrupted")
    if not aside.exists():
        return
    ours, theirs = newest(folder), newest(aside)
    is_older = ours is not None and (theirs is None or ours.step >= theirs.step)
    if is_older or not found(aside):
        shutil.rmtree(aside, ignore_errors=True)  # another call of the study may remove it too


def run_main(line: list[str], log: Path, environment: dict[str, str]) -> int:
    """Run `main.py` with a command line in a new process, its output in a file; return the exit code."""
    return start_main(line, log, environment).wait()


def start_main(line: list[str], log: Path, environment: dict[str, str]) -> "subprocess.Popen[bytes]":
    """Start `main.py` with a command line in a new process, its output in a file."""
    with open(log, "w") as output:
        command = [sys.executable, str(MAIN), *line]
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env={**os.environ, **environment})


def _put_away(folder: Path, run: Path) -> None:
    """Remove a folder, or give it a name of its own if it has checkpoints: one that cannot be read now may be whole."""
    if not found(folder):
        _remove(folder)
        return
    number = 1
    while (kept := beside(run, f".kept-{number}")).exists():
        number += 1
    folder.rename(kept)


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _copy_lines(file: Path, folder: Path) -> None:
    """Copy the lines of a file that were written to their end."""
    whole, _, _ = file.read_bytes().rpartition(b"\n")
    (folder / file.name).write_bytes(whole + b"\n" if whole else b"")
