"""A study: arms by seeds over a base config, what is measured, and what is claimed.

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

import hashlib
import itertools
import re
from dataclasses import dataclass, field
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from cli.config_errors import FriendlyParser
from datamodules.errors import UserError
from studies.engine.arms import PRODUCTS, REFERENCE, Arm, Resolve, expand, needs_of, resolve_arm
from studies.engine.attempt import read_result
from studies.engine.claims import Claim, parse

NAME = re.compile(r"[A-Za-z_]\w*")


@dataclass
class StudyFile:
    """What a study's YAML holds.

    Attributes:
        base: Configs that all arms share; may be empty, then each arm's own configs come before `set`.
        arms: Name -> condition; the first is what the others are compared with.
        measures: Names in `results.json`; the first is what a claim means that names an arm alone.
        seeds: How many, from 0, or which.
        claims: Name, such as a number in the ledger -> claim.
        curves: Scalars in TensorBoard to draw over steps.
        set: Key -> value, for all arms.
    """

    base: list[str]
    arms: dict[str, Arm | None]
    measures: list[str]
    seeds: int | list[int] = 1
    claims: dict[str, str] = field(default_factory=dict)
    curves: list[str] = field(default_factory=list)
    set: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Run:
    """One run of a study.

    Attributes:
        arm: Its arm.
        seed: Its seed.
        command: What is run.
        config: The resolved config, as YAML.
        folder: Where it goes; named by the config's hash, so that a finished run is found again.
        wave: Runs of a wave need only what earlier waves made.
        needs: Arms whose runs it uses.
    """

    arm: str
    seed: int
    command: str
    config: str
    folder: Path
    wave: int
    needs: frozenset[str]

    @property
    def name(self) -> str:
        """Arm and seed."""
        return f"{self.arm}, seed {self.seed}"

    @property
    def result(self) -> dict[str, Any] | None:
        """The run's `results.json`, if it came to its end."""
        return read_result(self.folder)


@dataclass(frozen=True)
class Study:
    """A study made ready: every config resolved, every claim read, runs in waves.

    Attributes:
        name: The file's name.
        folder: `runs/studies/<name>`.
        arms: Names, sweeps written out.
        measures: As in the file.
        curves: As in the file.
        claims: The claims.
        runs: Every run, by wave.
        factors: For arms of a sweep: arm -> (sweep's name, key -> value).
    """

    name: str
    folder: Path
    arms: list[str]
    measures: list[str]
    curves: list[str]
    claims: list[Claim]
    runs: list[Run]
    factors: dict[str, tuple[str, dict[str, Any]]]


def load(path: str, resolve: Resolve, parent: str = "runs/studies") -> Study:
    """Read a study and check all of it before anything runs.

    Args:
        path: The YAML file.
        resolve: Gives the resolved config of a command line; exits on a user's mistake as the command itself does.
        parent: Where studies are kept.

    Raises:
        UserError: The study is wrong; says what and where.
    """
    if not Path(path).is_file():
        raise UserError(f"there is no study {path}")
    file = _parse(path)
    arms, factors = expand(file.arms)
    folder = Path(parent, Path(path).stem)
    claims = [parse(str(name), text, arms, file.measures) for name, text in file.claims.items()]
    shared = Arm(file.base, file.set)
    configs = {name: resolve_arm(name, shared, arm, resolve) for name, arm in arms.items()}
    needs = {name: needs_of(name, config, arms) for name, config in configs.items()}
    waves = _waves(needs)
    seeds = list(range(file.seeds)) if isinstance(file.seeds, int) else file.seeds
    runs: dict[tuple[str, int], Run] = {}
    for wave, names in enumerate(waves):
        for name, number in itertools.product(names, seeds):
            members = configs[name]["model"].get("init_args", {}).get("ensemble", 1)
            seed = number * members  # so that no two runs share a member
            text = yaml.safe_dump(configs[name] | {"seed_everything": seed}, sort_keys=False, width=1000)
            text = REFERENCE.sub(
                lambda match, number=number: str(runs[match[1], number].folder / PRODUCTS[match[2]]), text
            )
            digest = hashlib.sha256(f"{arms[name].command}\n{text}".encode()).hexdigest()[:8]
            where = folder / "runs" / name / f"{seed}-{digest}"
            runs[name, number] = Run(name, seed, arms[name].command, text, where, wave, frozenset(needs[name]))
    return Study(Path(path).stem, folder, list(arms), file.measures, file.curves, claims, list(runs.values()), factors)


def _parse(path: str) -> StudyFile:
    parser = FriendlyParser(prog="main.py study FILE")
    parser.add_class_arguments(StudyFile)
    file = parser.instantiate_classes(parser.parse_path(path))
    study = StudyFile(**{key: file[key] for key in StudyFile.__dataclass_fields__})
    if not study.arms or not study.measures:
        raise UserError(f"{path}: a study needs at least one of arms and one of measures")
    if not study.seeds or (isinstance(study.seeds, int) and study.seeds < 1):
        raise UserError(f"{path}: seeds must be at least 1, or a list of seeds")
    for name in study.arms:
        if not isinstance(name, str) or not NAME.fullmatch(name):
            raise UserError(f"{path}: arms.{name}: use letters, digits and _, so that claims can name it")
    return study


def _waves(needs: dict[str, set[str]]) -> list[list[str]]:
    sorter = TopologicalSorter(needs)
    try:
        sorter.prepare()
    except CycleError as error:
        raise UserError(f"arms use one another in a circle: {' <- '.join(error.args[1])}") from error
    waves = []
    while ready := sorter.get_ready():
        waves.append(sorted(ready, key=list(needs).index))
        sorter.done(*ready)
    return waves
