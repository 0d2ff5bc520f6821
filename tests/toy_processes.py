"""The processes of a study: it begins a session, which its runs and their workers stay in."""

from contextlib import suppress
from pathlib import Path


def processes(session: int) -> list[int]:
    """Return the processes of a session that are no zombies."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, _, owner, *_ = path.read_text().rpartition(")")[2].split()
            found += [int(path.parent.name)] if int(owner) == session and state != "Z" else []
    return found
