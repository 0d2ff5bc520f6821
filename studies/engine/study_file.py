"""The YAML file of a study.

base: [configs/telepathy_v15.yaml]
seeds: 3
arms:
  control: {}
  small: {configs: [overlay.yaml], set: {data.batch_size: 8}}
  silenced: {command: test, set: {ckpt_path: "{arms.control.checkpoint}"}}
measures: [test/accuracy]
claims:
  004-12: difference(control, small) > 0
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from datamodules.errors import UserError
from studies.engine.arms import LIKE_REFERENCE, Arm, expand

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from cli.friendly_parser import FriendlyParser

NAME = re.compile(r"[A-Za-z_]\w*")
MOST_SEEDS = 100_000


@dataclass
class StudyFile:
    """The keys of a study's YAML file.

    Attributes:
        base: Config files that all arms share. If empty, the configs of each arm come before `set`.
        arms: Name -> condition. The report compares the others with the first.
        measures: Names of metrics in `results.json`. A claim that names an arm alone means the first.
        seeds: Number of seeds, which start at 0, or a list of seeds.
        claims: Id -> claim. The id is any name, or the number of a claim in the ledger.
        curves: Names of logged scalars that the report draws over steps.
        set: Key -> value, for all arms.
    """

    base: list[str]
    arms: dict[str, Any]  # `read` makes an `Arm` of each, and says in which one a key is wrong
    measures: list[str]
    seeds: int | list[int] = 1
    claims: dict[str, str] = field(default_factory=dict)
    curves: list[str] = field(default_factory=list)
    set: dict[str, Any] = field(default_factory=dict)


def read(path: str) -> StudyFile:
    """Read the file of a study; a key without a value has its default.

    Raises:
        UserError: The file cannot be read, or a key is wrong; the message says which.
    """
    try:
        if Path(path).exists() and not Path(path).is_file():
            raise UserError(f"the study {path} cannot be read: it is not a file")
        Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        from lightning_modules.core.archive import nearest_file  # imports torch

        raise UserError(f"there is no study {path}{nearest_file(path)}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"the study {path} cannot be read: {error}") from error
    study = StudyFile(**_parsed(StudyFile, lambda parser: parser.parse_path(path)))
    study.arms = {name: _arm(path, name, keys) for name, keys in study.arms.items()}
    if not study.arms or not study.measures:
        raise UserError(f"{path}: a study needs at least one arm and one measure")
    if len(set(study.measures)) < len(study.measures):
        raise UserError(f"{path}: measures: each only once")
    if not study.seeds or (isinstance(study.seeds, int) and study.seeds < 1):
        raise UserError(f"{path}: seeds must be at least 1, or a list of seeds")
    seeds = [study.seeds] if isinstance(study.seeds, int) else study.seeds
    if min(seeds) < 0 or max(seeds) >= MOST_SEEDS or len(set(seeds)) < len(seeds):
        raise UserError(f"{path}: seeds must be at most {MOST_SEEDS}, not negative, and each only once")
    return study


def _arm(path: str, name: Any, keys: Any) -> Arm:
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise UserError(f"{path}: arms.{name}: use letters, digits and _, so that claims can name it")
    if not isinstance(keys, dict | None):
        raise UserError(f"{path}: arms.{name}: expected keys, such as 'set: {{data.batch_size: 8}}', not {keys!r}")
    try:
        return Arm(**_parsed(Arm, lambda parser: parser.parse_object(keys or {})))
    except SystemExit:
        sys.stderr.write(f"in the study's arms.{name}\n")
        raise


def _parsed(kind: type[StudyFile] | type[Arm], parse: Callable[["FriendlyParser"], "Namespace"]) -> dict[str, Any]:
    """Return the keys of a class in a file, without those that have no value; exits on a wrong key."""
    from cli.friendly_parser import FriendlyParser

    parser = FriendlyParser(prog="main.py study FILE")
    parser.add_class_arguments(kind)
    # Not `instantiate_classes`, which would build the callbacks that `set` names
    content = parse(parser).as_dict()
    return {key.name: content[key.name] for key in fields(kind) if content[key.name] is not None}


def first_wave(file: StudyFile) -> int:
    """Return the number of runs that use no other run, as far as the study's file shows it."""
    arms, _ = expand(file.arms)
    free = [arm for arm in arms.values() if not LIKE_REFERENCE.search(json.dumps(arm.set, default=str))]
    return max(1, len(free)) * (file.seeds if isinstance(file.seeds, int) else len(file.seeds))
