"""How a run stands, by what lies on disk: the exit code of its process does not matter."""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from studies.engine.products import fingerprint, is_whole
from studies.engine.records import ENDS, RESULTS, Damaged, Record, read_object, read_record


@dataclass(frozen=True)
class Outcome:
    """How a run stands.

    Attributes:
        record: The results of a run that came to its end, finished or diverged; None for every other run.
        state: State of a run that did not come to its end, such as `interrupted`; empty if it has not begun.
        damage: A sentence on what is wrong with the files of a run that seemed to be at its end; else empty.
    """

    record: Record | None
    state: str = ""
    damage: str = ""


def outcome(folder: Path, leaves: Iterable[str] = (), uses: Iterable[str] = ()) -> Outcome:
    """Return how a run stands.

    Args:
        folder: The run's folder.
        leaves: Files in that folder that other runs need; a run is finished only if they are whole.
        uses: Files of other runs that the run uses; a run that used other content has to run again.
    """
    try:
        record = read_record(folder)
        changed = changed_files(folder, uses)
    except Damaged as error:
        return Outcome(None, damage=str(error))
    if record is None:
        return Outcome(None, f"no {RESULTS}" if folder.exists() else "")
    if record["status"] not in ENDS:
        return Outcome(None, record["status"])
    if changed:
        return Outcome(None, damage=f"{changed[0]} has changed since {folder} used it")
    if record["status"] == "finished":
        for path in (folder / name for name in leaves):
            if not is_whole(path):
                fault = "is damaged" if path.exists() else "is missing"
                return Outcome(None, damage=f"{path}, which other runs need, {fault}")
    return Outcome(record)


def beside(folder: Path, suffix: str) -> Path:
    """Return the file or folder next to a run's folder that belongs to the run."""
    return folder.with_name(folder.name + suffix)


def remember_files(folder: Path, uses: Iterable[str]) -> None:
    """Write down the content of the files that a run is going to use."""
    from lightning_modules.core.files import replacing

    with replacing(beside(folder, ".uses.json")) as draft:
        draft.write_text(json.dumps({path: fingerprint(Path(path)) for path in uses}, indent=2) + "\n")


def changed_files(folder: Path, uses: Iterable[str]) -> list[str]:
    """Return the used files whose content is no longer what the run used.

    A missing file is left out: the run that makes it has to run again, and this run is looked at again after it.

    Raises:
        Damaged: The file that remembers the content is damaged.
    """
    known = read_object(beside(folder, ".uses.json"))
    if known is None:  # a run of an earlier revision, or one that uses nothing
        return []
    present = {path: found for path in uses if (found := fingerprint(Path(path))) is not None}
    return [path for path, found in present.items() if known.get(path) != found]
