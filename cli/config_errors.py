"""One-sentence explanations of configuration errors.

jsonargparse reports a wrong key or value as nested exceptions, each of which repeats all unions above it. What a user
needs is at the two ends: the keys that lead to the mistake, and the innermost cause. `explain` reads the chain of
causes for both and adds the nearest thing that would have been right.
"""

import difflib
import inspect
import os
import re
import sys
from argparse import RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

from jsonargparse import ArgumentParser, DefaultHelpFormatter
from lightning.pytorch.cli import LightningArgumentParser

from lightning_modules.core.checkpoints import nearest_file

KEY = re.compile(r'Parser key "([^"]+)"')
KEY_PREFIX = re.compile(r'Parser key "[^"]+":\s*')
OWNER = re.compile(r"(?:Problem with given |Type \S*Callable.*)class_path[ =]'([^']+)'", re.DOTALL)
SUBTYPES = re.compile(r"^\s*Subtypes: \[(.*)\]$", re.MULTILINE)
GIVEN = re.compile(r"^\s*Given value: (.*)$", re.MULTILINE)
UNKNOWN_KEY = re.compile(r"^unrecognized arguments: |Option '.*' is not accepted|does not accept option '.*'")
TYPE_NOISE = re.compile(r"<class '(?:[\w.]*\.)?(\w+)'>|(?:typing|collections\.abc)\.|(?:[a-z_]\w*\.)+(?=[A-Z])")


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Keeps the line breaks of the description."""


class FriendlyParser(LightningArgumentParser):
    """A parser whose errors are one sentence and a hint: no usage dump, no stack trace, exit code 2."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # No abbreviations: `--trainer.max_step` would pass today and become ambiguous with the next Lightning.
        super().__init__(*args, **{"formatter_class": HelpFormatter, "allow_abbrev": False} | kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Explains the error on stderr and exits with code 2."""
        if not self.exit_on_error:  # inner parsers: the outer one tries the next member of a union
            super().error(message, ex)
        sentence, hint = explain(getattr(ex, "subcommand_parser", None) or self, message, ex)
        sys.stderr.write(f"error: {sentence}\n{hint}\n")
        self.exit(2)


@dataclass
class Finding:
    """Where a parsing error lies.

    Attributes:
        cause: The innermost message.
        keys: The keys that lead to it.
        owner: The class whose arguments were being set, if any.
        union: The types that would have been accepted, if there were several.
        given: The value that was given, as text.
    """

    cause: str
    keys: list[str] = field(default_factory=list)
    owner: type | None = None
    union: list[str] = field(default_factory=list)
    given: str = ""

    @property
    def path(self) -> str:
        """The keys, dotted."""
        return ".".join(self.keys)

    def enter(self, text: str) -> None:
        """Goes one level further in."""
        self.cause = text.strip()
        if match := OWNER.match(self.cause):
            self.owner, self.union = _import(match[1]), []
        elif (match := KEY.match(self.cause)) and self.keys[-1:] != [match[1]]:
            self.keys.append(match[1])
        if match := SUBTYPES.search(self.cause):
            self.union = [kind for kind in _split(_plain(match[1])) if kind != "NoneType"]
            given = GIVEN.search(self.cause)
            self.given = given[1] if given else ""


def find(message: str, error: Exception | None) -> Finding:
    """Follows the chain of causes, and within a union the member that got furthest."""
    finding = Finding(message)
    texts = list(_causes(message, error))
    for text in texts:
        finding.enter(text)
    # The chain holds the first member of a union; another one may have got as far as a class and its arguments.
    if finding.cause.startswith("Expected a") and (deeper := OWNER.search(texts[-2] if len(texts) > 1 else "")):
        for line in texts[-2][deeper.start() :].splitlines():
            if not re.match(r"\s*(Does not validate|Subtypes: |Errors:)", line):
                finding.enter(line.strip().removeprefix("- "))
                if not OWNER.match(finding.cause) and not KEY.match(finding.cause):
                    break
    return finding


def explain(parser: ArgumentParser, message: str, error: Exception | None) -> tuple[str, str]:
    """Distils a parsing error.

    Args:
        parser: The parser that failed; its options are what a wrong key is compared with.
        message: What it wanted to print.
        error: The exception behind it, if any.

    Returns:
        One sentence (what is wrong, at which key, the nearest right thing) and how to list the choices.
    """
    found = find(message, error)
    cause, path, owner = found.cause, found.path, found.owner
    hint = f"{owner.__name__} takes: {_listed(arguments(owner))}" if owner else _help(parser)

    if UNKNOWN_KEY.search(cause):
        return _unknown_key(parser, found), hint
    if match := re.match(r"(?:Expected a dot import path string|Unexpected import path format): (.*)", cause):
        return _unknown_class(parser, match[1], found)
    if match := re.match(r"Import path (\S+) does not correspond to a subclass of (\w+)", cause):
        return f"{path}: {match[1]} is not a {match[2]}{_near(match[1], _subclasses(match[2]))}", hint
    if match := re.match(r"No module named '?([^']+)'?|(?:module|type object) '.*' has no attribute '(.*)'", cause):
        return f"{path}: cannot import {match[1] or match[2]}", hint
    if match := re.match(r"Expected an? (.*?)(?:\. Got value: (.*))?$", cause, re.DOTALL):
        # Of a union, the innermost cause is only the first member: all of them are what was expected.
        expected = " or ".join(found.union) if len(found.union) > 1 else _plain(match[1])
        return _wrong_value(path, expected, match[2] or found.given), hint
    if match := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", cause):
        choices = re.findall(r"[\w-]+", match[2])
        return f"there is no command '{match[1]}'{_near(match[1], choices)}", f"Commands: {', '.join(choices)}"
    if match := re.search(r'expected "subcommand" to be one of \{(.*)\}', cause):
        return "no command was given", f"Commands: {match[1].replace(',', ', ')}"
    if match := re.match(r"the following arguments are required: (.*)", cause):
        if owner:
            return f"{path}: {owner.__name__} needs a value for {match[1]}", hint
        missing = " and ".join(key.rpartition(".")[2] for key in match[1].split(", "))
        return f"no value for {missing}, usually given by --config FILE", hint
    if match := re.search(r"File does not exist: '?(.*?)'?$", cause):
        option = "--config" if path == "config" else path
        return f"{option}: there is no file {os.path.relpath(match[1])}{nearest_file(match[1])}", hint
    if mark := getattr(getattr(error, "__cause__", None), "problem_mark", None):
        return f"a config file is not valid YAML near line {mark.line + 1}: {error.__cause__.problem}", hint
    return ": ".join(filter(None, [path, " ".join(KEY_PREFIX.sub("", cause).split())])), hint


def _unknown_key(parser: ArgumentParser, found: Finding) -> str:
    cause, owner = found.cause, found.owner
    if match := re.match(r"unrecognized arguments: (\S+)", cause):
        if not match[1].startswith("-"):
            return f"unexpected argument '{match[1]}'"
        name = match[1].lstrip("-").partition("=")[0]
    else:
        name = re.findall(r"'([^']+)'", cause)[-1]
        if match := re.match(r"Group '([^']+)'", cause):
            name = f"{match[1]}.{name}"
    name = name.replace("init_args.", "")
    valid = arguments(owner) if owner else _options(parser)
    head = name.partition(".")[0]
    if head not in {option.partition(".")[0] for option in valid}:  # modle.class_path: only the first part is wrong
        valid, name = {option.partition(".")[0] for option in valid}, head
    where = ".".join([*found.keys, name])
    said = f"{owner.__name__} has no argument '{name}' ({where})" if owner else f"there is no key '{where}'"
    return said + _near(name, valid)


def _unknown_class(parser: ArgumentParser, name: str, found: Finding) -> tuple[str, str]:
    accepted = " ".join(found.union)
    if not accepted and found.owner:  # a callable that returns, say, an optimizer
        accepted = str(getattr(inspect.signature(found.owner).parameters.get(found.keys[-1]), "annotation", ""))
    # `list[Callback]` and `Callback` name the same base.
    choices = {base: _subclasses(base) for base in re.findall(r"\b[A-Z]\w+", accepted)}
    kind = next((base for base in choices if choices[base]), "class")
    known = set().union(*choices.values())
    hint = f"Choices: {_listed(known)}" if 0 < len(known) <= 15 else _help(parser)
    return f"{found.path}: there is no {kind} '{name}'{_near(name.rpartition('.')[2], known)}", hint


def _wrong_value(path: str, expected: str, value: str) -> str:
    choices = re.findall(r"'([^']+)'", expected) if expected.startswith("Literal") else []
    expected = f"one of {', '.join(choices)}" if choices else expected
    return f"{path}: expected {expected}, got {value.strip()!r}{_near(value, choices)}"


def arguments(owner: type) -> set[str]:
    """Names of all arguments of a class that a config may set, nested ones dotted."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(owner, fail_untyped=False)
    return _options(parser)


def _options(parser: ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions} - {"help", "print_config"}


def _subclasses(base: str) -> set[str]:
    """Names of the loaded public classes that derive from a class called `base`."""
    found = set()
    named = [getattr(module, base, None) for module in list(sys.modules.values())]
    stack = [cls for cls in named if isinstance(cls, type) and cls.__module__ != "collections.abc"]
    while stack:
        classes = type.__subclasses__(stack.pop())
        stack += classes
        found |= {cls.__name__ for cls in classes if not cls.__module__.startswith("lightning.pytorch.demos")}
    return {name for name in found if not name.startswith("_")}


def _near(name: str, valid: Iterable[str]) -> str:
    lower = {choice.lower(): choice for choice in sorted(valid)}
    close = difflib.get_close_matches(str(name).lower(), lower, 1, cutoff=0.6)
    return f"; did you mean '{lower[close[0]]}'?" if close else ""


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted({name.partition(".")[0] for name in names})) or "no arguments"


def _help(parser: ArgumentParser) -> str:
    return f"List choices: python {parser.prog.replace(' [options]', '')} --help"


def _causes(message: str, error: BaseException | None) -> Iterator[str]:
    """The messages from the outermost exception to the innermost, repetitions left out."""
    yield message
    last = message
    while error is not None:
        if str(error).strip() != last.strip():
            yield str(error)
        last = str(error)
        error = error.__cause__ or error.__context__


def _plain(types: str) -> str:
    return TYPE_NOISE.sub(lambda match: match[1] or "", types)


def _split(types: str) -> list[str]:
    """Splits at commas outside brackets."""
    return [part.strip() for part in re.split(r",\s*(?![^\[]*\])", types)]


def _import(class_path: str) -> type | None:
    module, _, name = class_path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)
