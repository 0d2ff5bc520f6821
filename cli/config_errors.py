"""Explanations of configuration errors: one sentence with the nearest valid name, and one line on the choices."""

import inspect
import os
import re
from collections.abc import Callable
from typing import NamedTuple

import yaml
from jsonargparse import ArgumentParser

from cli.choices import arguments, listed, near, number_of, options, subclasses
from cli.parse_causes import KEY, Finding, find, plain

KEY_PREFIX = re.compile(KEY.pattern + r":\s*")
UNKNOWN_KEY = re.compile(r"^unrecognized arguments: |Option '.*' is not accepted|does not accept option '.*'")


class Problem(NamedTuple):
    """A parsing error.

    Attributes:
        parser: The parser that failed; a wrong key is compared with its options.
        finding: Where the error lies.
        error: The exception.
    """

    parser: ArgumentParser
    finding: Finding
    error: BaseException | None

    @property
    def hint(self) -> str:
        """One line on how to list the choices."""
        owner = self.finding.owner
        if owner:
            return f"{owner.__name__} takes: {listed(arguments(owner))}"
        return f"List choices: python {self.parser.prog.replace(' [options]', '')} --help"


Explanation = tuple[str, str]


def explain(parser: ArgumentParser, message: str, error: BaseException | None) -> Explanation:
    """Explain a parsing error.

    Args:
        parser: The parser that failed.
        message: The message that it would print.
        error: The exception behind the message, if any.

    Returns:
        One sentence (what is wrong, at which key, the nearest valid name) and one line on how to list the choices.
    """
    problem = Problem(parser, find(message, error), error)
    for rule in RULES:
        if explanation := rule(problem):
            return explanation
    cause = " ".join(KEY_PREFIX.sub("", problem.finding.cause).split())
    return ": ".join(filter(None, [problem.finding.path, cause])), problem.hint


def _unknown_key(problem: Problem) -> Explanation | None:
    cause, owner, keys = problem.finding.cause, problem.finding.owner, problem.finding.keys
    if not UNKNOWN_KEY.search(cause):
        return None
    if match := re.match(r"unrecognized arguments: (\S+)", cause):
        if not match[1].startswith("-"):
            return f"unexpected argument '{match[1]}'", problem.hint
        name = match[1].lstrip("-").partition("=")[0]
    else:
        name = re.findall(r"'([^']+)'", cause)[-1]
        if match := re.match(r"Group '([^']+)'", cause):
            name = f"{match[1]}.{name}"
    name = name.replace("init_args.", "")
    valid = arguments(owner) if owner else options(problem.parser)
    heads = {option.partition(".")[0] for option in valid}
    if name.partition(".")[0] not in heads:  # modle.class_path: only the first part is wrong
        valid, name = heads, name.partition(".")[0]
    where = ".".join([*problem.finding.places, name])
    if owner and owner.__module__.startswith("lightning.pytorch.core"):  # LightningModule and LightningDataModule
        hint = problem._replace(finding=Finding("")).hint  # the class has no arguments to list
        return f"{where}: no config names a class for '{keys[0]}': an overlay comes after a whole config", hint
    sentence = f"{owner.__name__} has no argument '{name}' ({where})" if owner else f"there is no key '{where}'"
    return sentence + near(name, valid), problem.hint


def _wrong_class(problem: Problem) -> Explanation | None:
    cause, path = problem.finding.cause, problem.finding.path
    if match := re.match(r"(?:Expected a dot import path string|Unexpected import path format): (.*)", cause):
        return _unknown_class(problem, match[1])
    if match := re.match(r"Import path (\S+) does not correspond to a subclass of (\w+)", cause):
        return f"{path}: {match[1]} is not a {match[2]}{near(match[1], subclasses(match[2]))}", problem.hint
    if match := re.match(r"No module named '?([^']+)'?|(?:module|type object) '.*' has no attribute '(.*)'", cause):
        return f"{path}: cannot import {match[1] or match[2]}", problem.hint
    return None


def _unknown_class(problem: Problem, name: str) -> Explanation:
    found = problem.finding
    accepted = " ".join(found.union)
    if not accepted and found.owner:  # a callable that returns, say, an optimizer
        accepted = _annotation(found.owner, found.keys[-1])
    accepted = re.sub(r"Callable\[\[[^]]*\], ", "", accepted)  # of `Callable[[Source], Bridge]` what it returns
    if (key := number_of(accepted)) and not re.match("[A-Za-z_]", name):
        return f"{found.path}: expected keys, such as {{{key}: {name}}}, got {name!r}", problem.hint
    # `list[Callback]` and `Callback` name the same base.
    choices = {base: subclasses(base) for base in re.findall(r"\b[A-Z]\w+", accepted)}
    kind = next((base for base in choices if choices[base]), "class")
    known = set().union(*choices.values())
    hint = f"Choices: {listed(known)}" if 0 < len(known) <= 15 else problem._replace(finding=Finding("")).hint
    return f"{found.path or 'help'}: there is no {kind} '{name}'{near(name.rpartition('.')[2], known)}", hint


def _annotation(owner: type, name: str) -> str:
    """Return the annotation of an argument of a class or of one of its bases, as text; empty if there is none."""
    makers = [vars(base).get("__init__") for base in inspect.getmro(owner)]
    signatures = [inspect.signature(make).parameters for make in makers if inspect.isfunction(make)]
    return next((str(own[name].annotation) for own in signatures if name in own), "")


def _wrong_value(problem: Problem) -> Explanation | None:
    found = problem.finding
    match = re.match(r"Expected an? (.*?)(?:\. Got value: (.*))?$", found.cause, re.DOTALL)
    if not match:
        return None
    # The innermost cause is about the first member of a union, but all its members are accepted.
    kinds = found.union if len(found.union) > 1 else [plain(match[1])]
    value = (match[2] or found.value).strip()
    expected = " or ".join("keys with values" if kind.startswith("dict") else kind for kind in kinds)
    choices = re.findall(r"'([^']+)'", " ".join(kind for kind in found.union or kinds if "Literal" in kind))
    expected = re.sub(r"Literal\[(.*?)\]", lambda listed: "one of " + listed[1].replace("'", ""), expected)
    words = [word for word in [value, *re.findall(r"\w+", value)] if word not in choices]  # of a list, each
    nearest = next(filter(None, (near(word, choices) for word in words)), "")
    return f"{found.path}: expected {expected}, got {value!r}{nearest}", problem.hint


def _wrong_command(problem: Problem) -> Explanation | None:
    cause = problem.finding.cause
    if match := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", cause):
        choices = re.findall(r"[\w-]+", match[2])
        return f"there is no command '{match[1]}'{near(match[1], choices)}", f"Commands: {', '.join(choices)}"
    if match := re.search(r'expected "subcommand" to be one of \{(.*)\}', cause):
        return "no command was given", f"Commands: {match[1].replace(',', ', ')}"
    return None


def _missing(problem: Problem) -> Explanation | None:
    found = problem.finding
    match = re.match(r"the following arguments are required: (.*)", found.cause)
    if not match:
        return None
    if found.owner:
        return f"{found.path}: {found.owner.__name__} needs a value for {match[1]}", problem.hint
    missing = " and ".join(key.rpartition(".")[2] for key in match[1].split(", "))
    source = ", usually given by --config FILE" if "config" in options(problem.parser) else ""
    return f"no value for {missing}{source}", problem.hint


def _unreadable(problem: Problem) -> Explanation | None:
    found = problem.finding
    option = "--config" if found.path in ("", "config") else found.path
    if match := re.search(r"File does not exist: '?(.*?)'?$", found.cause):
        if os.path.islink(match[1]):
            return f"{option}: {os.path.relpath(match[1])} is a link to a file that does not exist", problem.hint
        from lightning_modules.core.archive import nearest_file  # imports torch

        return f"{option}: there is no file {os.path.relpath(match[1])}{nearest_file(match[1])}", problem.hint
    if match := re.search(r"(?:Path|File) is (not .*?): '?(.*?)'?$", found.cause):
        return f"{option}: {os.path.relpath(match[2])} is {match[1]}", problem.hint
    file = getattr(problem.parser, "file", "") or "a config"
    if found.cause.startswith("Unexpected config:"):
        return f"{file} does not consist of keys and values, such as 'trainer: {{max_steps: 10}}'", problem.hint
    if yaml_error := _yaml_error(problem.error):
        mark = getattr(yaml_error, "problem_mark", None)
        near_line = f" near line {mark.line + 1}" if mark else ""
        reason = getattr(yaml_error, "problem", None) or getattr(yaml_error, "reason", "")
        return f"{file} is not valid YAML{near_line}: {reason}", problem.hint
    return None


def _yaml_error(error: BaseException | None) -> yaml.YAMLError | None:
    while error is not None and not isinstance(error, yaml.YAMLError):
        error = error.__cause__
    return error


def _no_class(problem: Problem) -> Explanation | None:
    found = problem.finding
    if not re.match(
        r"Not a valid subclass of|argument of type '\w+' is not |'\w+' object has no attribute", found.cause
    ):
        return None
    return f"{found.path}: expected a class, as {{class_path: NAME, init_args: {{KEY: VALUE}}}}", problem.hint


RULES: tuple[Callable[[Problem], Explanation | None], ...] = (
    _unknown_key,
    _wrong_class,
    _wrong_value,
    _wrong_command,
    _missing,
    _unreadable,
    _no_class,
)
