"""The arms of a study: conditions over a base config, sweeps, and what one arm uses of another."""

import itertools
import json
import re
import sys
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import yaml

from datamodules.errors import UserError
from studies.engine.claims import near

Resolve = Callable[[list[str]], dict[str, Any]]  # a command line -> its whole config
SECTIONS = ("model", "data", "trainer")
REFERENCE = re.compile(r"\{arms\.(\w+)\.(\w+)\}")
LIKE_ONE = re.compile(r"\{arm[^}]*\}")
PRODUCTS = {"folder": "", "checkpoint": "checkpoints/last.ckpt", "reference": "reference.safetensors"}


@dataclass
class Arm:
    """One condition of a study.

    Attributes:
        configs: Overlays over the base.
        set: Key -> value, as `--key value` on the command line; `clamp.reference` is the argument `reference` of the
            callback with that word in its name, which the configs must have. A value may name what another arm's run
            of the same seed made: `{arms.control.checkpoint}`, `.reference` or `.folder`.
        sweep: Key -> values: one arm for each combination, named `<arm>_<value>`.
        command: What is run.
    """

    configs: list[str] = field(default_factory=list)
    set: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, list[Any]] = field(default_factory=dict)
    command: Literal["fit", "validate", "test"] = "fit"


def expand(arms: dict[str, Arm | None]) -> tuple[dict[str, Arm], dict[str, tuple[str, dict[str, Any]]]]:
    """Write out sweeps: an arm for each combination of values."""
    expanded: dict[str, Arm] = {}
    factors: dict[str, tuple[str, dict[str, Any]]] = {}
    for name, arm in arms.items():
        arm = arm or Arm()
        if not all(arm.sweep.values()):
            raise UserError(f"arms.{name}.sweep: a key has no values")
        for values in itertools.product(*arm.sweep.values()):
            chosen = dict(zip(arm.sweep, values, strict=True))
            full = "_".join([name, *(_word(value) for value in values)])
            if full in expanded:
                raise UserError(f"arms.{name}: two arms would have the name {full}")
            expanded[full] = Arm(arm.configs, arm.set | chosen, {}, arm.command)
            if chosen:
                factors[full] = name, chosen
    return expanded, factors


def _word(value: Any) -> str:
    """A value as part of a name: 0.1 -> 0p1, -1 -> m1."""
    return re.sub(r"\W+", "_", str(value).replace(".", "p").replace("-", "m"))


def resolve_arm(name: str, shared: Arm, arm: Arm, resolve: Resolve) -> dict[str, Any]:
    """The arm's whole config, with references to other arms still as they were written.

    Args:
        name: The arm's name, for messages.
        shared: What all arms have; what the arm itself has wins.
        arm: The arm.
        resolve: Gives the resolved config of a command line.
    """
    line, of_callbacks = [arm.command], {}
    # Without a base, an arm's configs are what the study's keys are set in
    parts = [shared, arm] if shared.configs else [Arm(arm.configs), shared, Arm(set=arm.set)]
    for part in parts:
        line += [text for config in part.configs for text in ("--config", config)]
        for key, value in part.set.items():
            head, dot, _ = key.partition(".")
            if dot and head not in SECTIONS:
                of_callbacks[key] = value
            else:
                line += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
    try:
        config = resolve(line)
    except SystemExit:
        sys.stderr.write(f"in the study's arms.{name}\n")
        raise
    for key, value in of_callbacks.items():
        _set_of_callback(name, config, key, value)
    return config


def _set_of_callback(name: str, config: dict[str, Any], key: str, value: Any) -> None:
    """Set an argument of a callback that the configs brought: `clamp.reference` is ActivationClamp's."""
    head, _, argument = key.partition(".")
    given = config["trainer"]["callbacks"] or []
    callbacks = {callback["class_path"].rpartition(".")[2]: callback for callback in given}
    found = [one for one in callbacks if head == one or head in _words(one)]
    if len(found) != 1:
        which = f"{' and '.join(found)} are meant" if found else f"the callbacks are {', '.join(callbacks) or 'none'}"
        raise UserError(f"arms.{name}: set.{key} is neither a key of a config nor a callback's argument: {which}")
    arguments = callbacks[found[0]]["init_args"]
    if argument not in arguments:
        raise UserError(f"arms.{name}: set.{key}: {found[0]} has no '{argument}'{near(argument, arguments)}")
    arguments[argument] = value


def _words(name: str) -> list[str]:
    """`ActivationClamp` -> activation, clamp."""
    return [word.lower() for word in re.findall(r"[A-Z][a-z]*", name)]


def needs_of(name: str, config: dict[str, Any], arms: Collection[str]) -> set[str]:
    """The arms whose products an arm's config names."""
    needs = set()
    for written in LIKE_ONE.findall(yaml.safe_dump(config, width=1000)):
        if not (reference := REFERENCE.fullmatch(written)):
            raise UserError(f"arms.{name}: {written} names nothing: write {{arms.NAME.checkpoint}}")
        arm, product = reference.groups()
        if arm not in arms:
            raise UserError(f"arms.{name}: there is no arm {arm}{near(arm, arms)}")
        if product not in PRODUCTS:
            raise UserError(f"arms.{name}: a run has no '{product}'{near(product, PRODUCTS)}: {', '.join(PRODUCTS)}")
        needs.add(arm)
    return needs
