"""Records on disk, read as a whole or refused as damaged; imports nothing that takes time."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, NotRequired, TypedDict, cast

RESULTS = "results.json"
ENDS = ("finished", "diverged")  # states of runs that are not run again
KINDS = {dict: "an object", list: "a list", str: "a text", int: "a number", float: "a number", bool: "a truth value"}


class Damaged(ValueError):
    """A record that cannot be used; the message is a sentence that names the file."""


class GitState(TypedDict):
    """The revision of the code that made a run, and whether the checkout had other changes."""

    revision: str | None
    dirty: bool | None


class Record(TypedDict):
    """What a study reads of a run's `results.json`; `RunRecord` writes it.

    Attributes:
        status: `finished` for a run that came to its end, `diverged` for one whose numbers did not stay finite.
        seconds: Stage -> duration.
        metrics: Name -> value; null where the run has no finite value.
        intervals: Name -> 95 % interval over the run's test samples.
        n: Name -> number of samples behind the measure.
        hits: Name of a proportion -> number of hits for each ensemble member (one for an ordinary run).
        members: Of an ensemble: name -> value for each member, in the order of their seeds.
        git: The revision of the code.
        step: Of a diverged run: the step at which the divergence was seen.
    """

    status: str
    seconds: dict[str, float]
    metrics: dict[str, float | None]
    intervals: dict[str, tuple[float | None, float | None]]
    n: dict[str, int]
    hits: NotRequired[dict[str, list[int]]]  # absent from records of earlier revisions
    members: NotRequired[dict[str, list[float | None]]]
    git: GitState
    step: NotRequired[int | None]


def read_object(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; None if there is no file.

    Raises:
        Damaged: The file cannot be read, or holds something else.
    """
    try:
        content = json.loads(path.read_bytes(), parse_constant=_refuse_constant)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise Damaged(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise Damaged(f"{path} is damaged: it is not whole JSON") from error
    if not isinstance(content, dict):
        raise Damaged(f"{path} is damaged: it holds {KINDS.get(type(content), 'nothing')} instead of an object")
    return content


def read_record(folder: Path) -> Record | None:
    """Return the `results.json` of a run; None if there is none.

    Raises:
        Damaged: The file is not whole, or lacks a key that the record of a run in its state has.
    """
    path = folder / RESULTS
    if (content := read_object(path)) is None:
        return None
    if not isinstance(content.get("status"), str):
        raise Damaged(f"{path} is damaged: it has no status")
    if content["status"] in ENDS:
        for key, is_right in KEYS.items():
            if key not in content and key not in OPTIONAL:
                raise Damaged(f"{path} is damaged: it has no '{key}'")
            if key in content and not is_right(content[key]):
                raise Damaged(f"{path} is damaged: its '{key}' is not what a run writes")
        if not _members_agree(content):
            raise Damaged(f"{path} is damaged: its 'hits', 'n' and 'members' contradict one another")
    return cast(Record, content)


def _refuse_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not JSON")  # Python reads NaN and Infinity, and no run writes them


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_number_or_null(value: Any) -> bool:
    return value is None or _is_number(value)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_interval(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(_is_number_or_null, value))


def _by_name(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, dict) and all(map(is_right, value.values()))


def _listed(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_right, value))


def _is_git_state(value: Any) -> bool:
    if not isinstance(value, dict) or not {"revision", "dirty"} <= value.keys():
        return False
    return isinstance(value["revision"], str | None) and isinstance(value["dirty"], bool | None)


def _members_agree(content: dict[str, Any]) -> bool:
    """Return whether every proportion has as many counts as members, and no more hits than samples."""
    members = content.get("members", {})
    for name, hits in content.get("hits", {}).items():
        if hits and members.get(name) and len(hits) != len(members[name]):
            return False
        if (count := content["n"].get(name)) is not None and any(hit > count for hit in hits):
            return False
    return True


KEYS: dict[str, Callable[[Any], bool]] = {
    "seconds": _by_name(_is_number),
    "metrics": _by_name(_is_number_or_null),
    "intervals": _by_name(_is_interval),
    "n": _by_name(_is_count),
    "hits": _by_name(_listed(_is_count)),
    "members": _by_name(_listed(_is_number_or_null)),
    "git": _is_git_state,
    "step": lambda value: value is None or _is_count(value),
}
OPTIONAL = ("hits", "members", "step")
