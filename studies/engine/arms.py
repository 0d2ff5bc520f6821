"""The arms of a study: conditions over a base config, sweeps, and the files that one arm uses of another."""

import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, Literal

from cli.choices import near
from datamodules.errors import UserError

Config = dict[str, Any]  # a resolved config
SECTIONS = ("model", "data", "trainer")
SET_BY_STUDY = {"seed_everything": "seeds", "trainer.default_root_dir": "the study's name"}  # key -> what decides it
CALLBACK = re.compile(r"(\w+)(?:\[(\d+)\])?")
REFERENCE = re.compile(r"\{arms\.(\w+)\.(\w+)\}")
LIKE_REFERENCE = re.compile(r"\{arm[^}]*\}")
PRODUCTS = {"folder": "", "checkpoint": "checkpoints/last.ckpt", "reference": "reference.safetensors"}


@dataclass
class Arm:
    """One condition of a study.

    Attributes:
        configs: Config files that overlay the base.
        set: Key -> value, as `--key value` on the command line. `clamp.reference` sets the argument `reference` of the
            callback that has the word `clamp` in its class name, which one of the configs must add. If several
            callbacks match, write the class name, or count the matches from 0: `ActivationClamp.reference`,
            `clamp[1].reference`. A value may name a file of another arm's run with the same seed:
            `{arms.control.checkpoint}`, `{arms.control.reference}` or `{arms.control.folder}`.
        sweep: Key -> list of values. The arm becomes one arm for each combination, named `<arm>_<value>`.
        command: `fit`, `validate` or `test`.
    """

    configs: list[str] = field(default_factory=list)
    set: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    command: Literal["fit", "validate", "test"] = "fit"


@dataclass(frozen=True)
class Factors:
    """What makes an arm of a sweep.

    Attributes:
        sweep: Name of the arm in the study's file.
        values: Key -> value in this arm.
    """

    sweep: str
    values: dict[str, Any]


def expand(arms: dict[str, Arm]) -> tuple[dict[str, Arm], dict[str, Factors]]:
    """Replace each arm with a sweep by one arm for each combination of values.

    Returns:
        The arms, and the factors of those that come from a sweep.
    """
    expanded: dict[str, Arm] = {}
    factors: dict[str, Factors] = {}
    for name, arm in arms.items():
        if empty := [key for key, values in arm.sweep.items() if not values]:
            raise UserError(f"arms.{name}.sweep: {empty[0]} has no values")
        for values in itertools.product(*arm.sweep.values()):
            chosen = dict(zip(arm.sweep, values, strict=True))
            full = "_".join([name, *(_word(value) for value in values)])
            if full in expanded:
                raise UserError(f"arms.{name}: two arms would have the name {full}")
            expanded[full] = Arm(arm.configs, arm.set | chosen, {}, arm.command)
            if chosen:
                factors[full] = Factors(name, chosen)
    return expanded, factors


def _word(value: Any) -> str:
    """Write a value as part of a name: 0.1 -> 0p1, -1 -> m1."""
    return re.sub(r"\W+", "_", str(value).replace(".", "p").replace("-", "m"))


def resolve_arm(name: str, shared: Arm, arm: Arm, resolve: Callable[..., Config]) -> Config:
    """Return the arm's resolved config; references to other arms are still as written.

    Args:
        name: The arm's name, for error messages.
        shared: The configs and keys that all arms share; those of the arm take precedence.
        arm: The arm.
        resolve: Gives the resolved config of a command line, whose words are its arguments.
    """
    line: list[str] = [arm.command]
    of_callbacks: dict[str, Any] = {}
    # Without a base, the study's keys modify the configs of the arm
    parts = [shared, arm] if shared.configs else [Arm(arm.configs), shared, Arm(set=arm.set)]
    for part in parts:
        line += [text for config in part.configs for text in ("--config", config)]
        for key, value in part.set.items():
            if key in SET_BY_STUDY:
                raise UserError(f"arms.{name}: set.{key} has no effect, because {SET_BY_STUDY[key]} decides it")
            head, dot, _ = str(key).partition(".")
            if dot and head not in SECTIONS:
                of_callbacks[key] = value
            else:
                line += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    try:
        config = deepcopy(resolve(*line))
    except UserError as error:
        raise UserError(f"arms.{name}: {error}") from error
    except SystemExit:
        sys.stderr.write(f"in the study's arms.{name}\n")
        raise
    for key, value in of_callbacks.items():
        try:
            _set_of_callback(_as_list(config["trainer"]["callbacks"]), key, value)
        except UserError as error:
            raise UserError(f"arms.{name}: set.{key}: {error}") from error
    return config


def _set_of_callback(callbacks: list[Config], key: str, value: Any) -> None:
    """Set an argument of a callback in a config: `clamp.reference` is the argument `reference` of ActivationClamp."""
    head, _, argument = key.partition(".")
    callback = _find_callback(callbacks, head)
    arguments = callback.get("init_args", {})
    if argument not in arguments:
        raise UserError(f"{_class_name(callback)} has no argument '{argument}'{near(argument, arguments)}")
    arguments[argument] = value


def _find_callback(callbacks: list[Config], head: str) -> Config:
    """Return the callback that `clamp`, `ActivationClamp` or `clamp[1]` means."""
    address = CALLBACK.fullmatch(head)
    word, place = address.groups() if address else (head, None)
    classes = [_class_name(callback) for callback in callbacks]
    matches = [number for number, name in enumerate(classes) if word == name or word in _words(name)]
    if not matches:
        known = ", ".join(dict.fromkeys(classes)) or "none"
        raise UserError(f"neither a key of a config nor an argument of a callback; the callbacks are {known}")
    if place is not None and int(place) >= len(matches):
        raise UserError(f"only {len(matches)} of the callbacks match '{word}', and the first is {word}[0]")
    if place is None and len(matches) > 1:
        names = [classes[number] for number in matches]
        candidates = [
            name if names.count(name) == 1 else f"{name}[{names[:position].count(name)}]"
            for position, name in enumerate(names)
        ]
        raise UserError(f"'{word}' matches {len(matches)} callbacks; write {' or '.join(candidates)} instead")
    return callbacks[matches[int(place or 0)]]


def _as_list(callbacks: Any) -> list[Config]:
    """Return `trainer.callbacks` of a config, which may be null or a single callback, as a list."""
    return callbacks if isinstance(callbacks, list) else [callbacks] if callbacks else []


def _class_name(node: Config) -> str:
    name: str = node["class_path"].rpartition(".")[2]
    return name


def _words(name: str) -> list[str]:
    """Split a class name: `ActivationClamp` -> activation, clamp."""
    return [word.lower() for word in re.findall(r"[A-Z][a-z]*", name)]


def needs_of(name: str, configs: dict[str, Config], arms: dict[str, Arm]) -> set[str]:
    """Return the arms whose files an arm's config names.

    Raises:
        UserError: A reference names no arm, or a file that the runs of that arm do not leave.
    """
    needs = set()
    for written in LIKE_REFERENCE.findall(json.dumps(configs[name], default=str, ensure_ascii=False)):
        if not (reference := REFERENCE.fullmatch(written)):
            raise UserError(f"arms.{name}: {written} is no reference; write {{arms.NAME.checkpoint}}")
        arm, product = reference.groups()
        if arm not in arms:
            raise UserError(f"arms.{name}: there is no arm {arm}{near(arm, arms)}")
        if product not in PRODUCTS:
            raise UserError(f"arms.{name}: a run has no '{product}'{near(product, PRODUCTS)}: {', '.join(PRODUCTS)}")
        if product == "checkpoint" and arms[arm].command != "fit":
            raise UserError(f"arms.{name}: {written}: a run of arms.{arm} does not train, and leaves no checkpoint")
        if product == "reference" and not _leaves_reference(configs[arm]):
            raise UserError(
                f"arms.{name}: {written}: arms.{arm} needs the callback ActivationReference, without `path`"
            )
        needs.add(arm)
    return needs


def _leaves_reference(config: Config) -> bool:
    return any(
        "reference" in _words(_class_name(callback)) and not callback.get("init_args", {}).get("path")
        for callback in _as_list(config["trainer"]["callbacks"])
    )


def differences(configs: dict[str, Config]) -> dict[str, dict[str, Any]]:
    """Return the settings in which the arms differ: arm -> key -> value.

    Keys are as on the command line, without `init_args`; an argument of a callback has the key `Class.argument`. An arm
    lacks the keys that do not exist in its config.
    """
    settings = {name: dict(_settings("", config)) for name, config in configs.items()}
    keys = dict.fromkeys(key for known in settings.values() for key in known)
    varying = [key for key in keys if len({repr(known.get(key, KeyError)) for known in settings.values()}) > 1]
    return {name: {key: known[key] for key in varying if key in known} for name, known in settings.items()}


def _settings(key: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Write out a config: every key with its value."""
    prefix = f"{key}." if key else ""
    if key == "trainer.callbacks":
        seen: Counter[str] = Counter()
        for callback in _as_list(value):
            name = _class_name(callback)
            yield from _settings(f"{name}[{seen[name]}]" if seen[name] else name, callback)
            seen[name] += 1
    elif isinstance(value, dict) and "class_path" in value:
        yield key, _class_name(value)
        for name, inner in value.get("init_args", {}).items():
            yield from _settings(prefix + name, inner)
    elif isinstance(value, dict) and value:
        for name, inner in value.items():
            yield from _settings(prefix + str(name), inner)
    else:
        yield key, value
