"""Names of earlier versions in configs and on command lines: they keep working and warn once with the new name.

Config files of finished runs hold the names of the version that ran them. Files and nested values pass through the
YAML loader of jsonargparse; the keys of a command line are rewritten before it is parsed.
"""

import re
from enum import Enum
from functools import cache
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader
from lightning.pytorch.utilities import rank_zero_warn

from cli.yaml_text import check_text

CLASSES = {
    "LanguageModel": "QuestionAnswering",
    "lightning_modules.LanguageModel": "QuestionAnswering",
    "lightning_modules.language_model.LanguageModel": "QuestionAnswering",
    "lightning_modules.Orthogonality": "Orthogonality",
    "lightning_modules.PerceiverBridge": "PerceiverBridge",
    "lightning_modules.Separability": "Separability",
    "lightning_modules.Telepathy": "Telepathy",
    "lightning_modules.TokenBridge": "TokenBridge",
}
ARGUMENTS = {"Telepathy": {"faithful": "reproduce_flaws"}}  # class -> old name of an argument -> new name
OF_ANY_MODEL = {old: new for arguments in ARGUMENTS.values() for old, new in arguments.items()}
MODEL_KEY = re.compile(rf"(--model\.(?:init_args\.)?)({'|'.join(OF_ANY_MODEL)})")


def install() -> None:
    """Have jsonargparse read YAML with the new names."""
    load = get_loader("yaml")

    def load_renamed(text: str) -> Any:
        check_text(text)
        try:
            return renamed(load(text))
        except (ValueError, RecursionError) as error:  # a number or a date that Python does not take
            raise yaml.MarkedYAMLError(problem=str(error)) from error

    set_loader("yaml", load_renamed, exceptions=(yaml.YAMLError,))
    # Some arguments of Lightning's classes have members of enumerations as defaults
    yaml.SafeDumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


def renamed(config: Any) -> Any:
    """Return a config, or a part of one, with the new names."""
    if isinstance(config, list):
        return [renamed(item) for item in config]
    if not isinstance(config, dict):
        return config
    config = {key: renamed(value) for key, value in config.items()}
    class_path = config.get("class_path")
    if isinstance(class_path, str):
        config["class_path"] = class_path = _new(class_path, CLASSES)
    if isinstance(config.get("init_args"), dict):
        # An overlay may leave out the class path.
        names = ARGUMENTS.get(class_path.rpartition(".")[2], {}) if isinstance(class_path, str) else OF_ANY_MODEL
        config["init_args"] = {_new(key, names): value for key, value in config["init_args"].items()}
    return config


def renamed_line(line: list[str]) -> list[str]:
    """Return a command line with the new names."""
    return [_renamed_text(text) for text in line]


def _renamed_text(text: str) -> str:
    key, equals, value = text.partition("=")
    if not key.startswith("--"):
        return _new(text, CLASSES)
    if match := MODEL_KEY.fullmatch(key):
        key = match[1] + _new(match[2], OF_ANY_MODEL)
    return key + equals + _new(value, CLASSES)


def _new(name: str, table: dict[str, str]) -> str:
    new = table.get(name, name)
    if new != name:
        _warn(name, new)
    return new


@cache  # once per name
def _warn(old: str, new: str) -> None:
    rank_zero_warn(f"{old} is now named {new}; the old name still works", category=FutureWarning)
