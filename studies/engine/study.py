"""A study: arms over a base config, each run with several seeds; what is measured, and what is claimed."""

import hashlib
import itertools
import json
from dataclasses import dataclass, field
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Any

import yaml

from datamodules.errors import UserError
from studies.engine.arms import (
    PRODUCTS,
    REFERENCE,
    Arm,
    Config,
    Factors,
    differences,
    expand,
    needs_of,
    resolve_arm,
)
from studies.engine.claims import Claim, parse
from studies.engine.outcome import Outcome, outcome
from studies.engine.records import Record
from studies.engine.resolver import resolve
from studies.engine.study_file import StudyFile, read


@dataclass(frozen=True)
class Run:
    """One run of a study: an arm with a seed.

    Attributes:
        arm: Name of the arm.
        seed: The seed; of an ensemble, the seed of the first member.
        command: `fit`, `validate` or `test`.
        config: The resolved config, as YAML.
        folder: The run's folder. Its name has a hash of the config, so that a finished run is not run again.
        wave: The runs of a wave need only files of runs of earlier waves.
        uses: Files of other runs that the run uses.
        leaves: Files in the folder that other runs use.
        members: Number of ensemble members, each with a seed of its own.
    """

    arm: str
    seed: int
    command: str
    config: str
    folder: Path
    wave: int
    uses: tuple[str, ...] = ()
    leaves: tuple[str, ...] = ()
    members: int = 1

    @property
    def name(self) -> str:
        """Arm and seed, for messages."""
        return f"{self.arm}, seed {self.seed}"

    @property
    def outcome(self) -> Outcome:
        """How the run stands, by its files."""
        return outcome(self.folder, self.leaves, self.uses)

    @property
    def result(self) -> Record | None:
        """The run's `results.json`; None unless the run is finished."""
        record = self.outcome.record
        return record if record and record["status"] == "finished" else None

    @property
    def divergence(self) -> Record | None:
        """The run's `results.json`; None unless the run has diverged."""
        record = self.outcome.record
        return record if record and record["status"] == "diverged" else None


@dataclass(frozen=True)
class Study:
    """A study that is ready to run: every config is resolved, every claim parsed, and the runs are in waves.

    Attributes:
        name: Name of the study's file, without `.yaml`.
        folder: `runs/studies/<name>`.
        arms: Names of the arms; a sweep gives one for each combination of values.
        measures: As in the file.
        curves: As in the file.
        claims: The claims.
        runs: Every run, by wave.
        factors: The factors of each arm that comes from a sweep.
        settings: Arm -> key -> value, for every key of the resolved config in which the arms differ.
    """

    name: str
    folder: Path
    arms: list[str]
    measures: list[str]
    curves: list[str]
    claims: list[Claim]
    runs: list[Run]
    factors: dict[str, Factors] = field(default_factory=dict)
    settings: dict[str, dict[str, Any]] = field(default_factory=dict)

    def needed(self, run: Run) -> list[Run]:
        """Return the runs whose files a run uses."""
        folders = {folder for path in map(Path, run.uses) for folder in (path, *path.parents)}
        return [other for other in self.runs if other.folder in folders]


def load(path: str, parent: str = "runs/studies") -> Study:
    """Read a study and check all of it before anything runs: `read`, then `resolve_arms`."""
    return resolve_arms(read(path), path, parent)


def resolve_arms(file: StudyFile, path: str, parent: str = "runs/studies") -> Study:
    """Resolve the config of every arm; exits on a wrong config, as the run itself does.

    Args:
        file: The keys of the study's file.
        path: The file.
        parent: The folder of all studies.

    Raises:
        UserError: A claim, a sweep or a reference is wrong; the message says where.
    """
    arms, factors = expand(file.arms)
    claims = [parse(str(name), text, list(arms), file.measures) for name, text in file.claims.items()]
    shared = Arm(file.base, file.set)
    resolve_once = cache(resolve)  # arms that differ in arguments of callbacks alone have one command line
    configs = {name: resolve_arm(name, shared, arm, resolve_once) for name, arm in arms.items()}
    seeds = list(range(file.seeds)) if isinstance(file.seeds, int) else file.seeds
    folder = Path(parent, Path(path).stem)
    runs = _make_runs(arms, configs, seeds, folder / "runs")
    settings = differences(configs)
    return Study(folder.name, folder, list(arms), file.measures, file.curves, claims, runs, factors, settings)


def _make_runs(arms: dict[str, Arm], configs: dict[str, Config], seeds: list[int], parent: Path) -> list[Run]:
    """Return a run for each arm and seed, by wave."""
    needs = {name: needs_of(name, configs, arms) for name in configs}
    named = {pair for config in configs.values() for pair in REFERENCE.findall(json.dumps(config, default=str))}
    leaves = {name: tuple(sorted(PRODUCTS[product] for arm, product in named if arm == name)) for name in arms}
    runs: dict[tuple[str, int], Run] = {}
    for wave, names in enumerate(_waves(needs)):
        for name, number in itertools.product(names, seeds):
            members: int = configs[name]["model"].get("init_args", {}).get("ensemble", 1)
            seed = number * members  # so that no two runs share a member
            text = yaml.safe_dump(configs[name] | {"seed_everything": seed}, sort_keys=False, width=1000)

            uses: dict[str, str] = {}  # reference -> path
            for reference in REFERENCE.finditer(text):
                uses[reference[0]] = str(runs[reference[1], number].folder / PRODUCTS[reference[2]])
            for written, path in uses.items():
                text = text.replace(written, path)
            command = arms[name].command
            digest = hashlib.sha256(f"{command}\n{text}".encode()).hexdigest()[:8]
            folder = parent / name / f"{seed}-{digest}"
            files = tuple(sorted(uses.values())), leaves[name]
            runs[name, number] = Run(name, seed, command, text, folder, wave, *files, members)
    return list(runs.values())


def _waves(needs: dict[str, set[str]]) -> list[list[str]]:
    """Sort the arms into waves: each needs only arms of earlier waves."""
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
