"""One-sentence explanations of configuration errors.

jsonargparse reports a wrong key or value as nested exceptions, each of which repeats all unions above it. What a user
needs is at the two ends: the keys that lead to the mistake, and the innermost cause. `explain` reads the chain of
causes for both and adds the nearest thing that would have been right.
"""

import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator
from typing import NoReturn

from jsonargparse import ArgumentParser, Namespace
from lightning.pytorch.cli import LightningArgumentParser

KEY = re.compile(r'Parser key "([^"]+)"')
OWNER = re.compile(r"Problem with given class_path '([^']+)'")
SUBTYPES = re.compile(r"^\s*Subtypes: \[(.*)\]$", re.MULTILINE)
GIVEN = re.compile(r"^\s*Given value: (.*)$", re.MULTILINE)
TYPE_NOISE = re.compile(r"<class '(?:[\w.]*\.)?(\w+)'>|(?:typing|collections\.abc)\.|(?:[a-z_]\w*\.)+(?=[A-Z])")


class FriendlyParser(LightningArgumentParser):
    """A parser whose errors are one sentence and a hint: no usage dump, no stack trace, exit code 2."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Explains the error on stderr and exits with code 2."""
        if not self.exit_on_error:  # inner parsers: the outer one tries the next member of a union
            super().error(message, ex)
        sentence, hint = explain(getattr(ex, "subcommand_parser", None) or self, message, ex)
        sys.stderr.write(f"error: {sentence}\n{hint}\n")
        self.exit(2)


def explain(parser: ArgumentParser, message: str, error: Exception | None) -> tuple[str, str]:
    """Distils a parsing error.

    Args:
        parser: The parser that failed; its options are what a wrong key is compared with.
        message: What it wanted to print.
        error: The exception behind it, if any.

    Returns:
        One sentence (what is wrong, at which key, the nearest right thing) and how to list the choices.
    """
    keys: list[str] = []
    owner: type | None = None
    union: list[str] = []
    given = ""
    cause = message
    for text in _causes(message, error):
        cause = text.strip()
        if match := OWNER.match(cause):
            owner, union = _import(match[1]), []
        elif match := KEY.match(cause):
            keys.append(match[1])
        if match := SUBTYPES.search(cause):
            union = [kind for kind in _split(_plain(match[1])) if kind != "NoneType"]
            given = GIVEN.search(cause)[1] if GIVEN.search(cause) else ""
    path = ".".join(keys)
    hint = _hint(parser, keys, owner)

    if cause.startswith("unrecognized arguments") or re.search(r"(?:is not accepted|does not accept option '.*')$", cause):
        return _unknown_key(parser, cause, keys, owner), hint
    if match := re.match(r"(?:Expected a dot import path string|Unexpected import path format): (.*)", cause):
        return _unknown_class(match[1], path, union), hint
    if match := re.match(r"Import path (\S+) does not correspond to a subclass of (\w+)", cause):
        return f"{path}: {match[1]} is not a {match[2]}{_near(match[1], _subclasses(match[2]))}", hint
    if match := re.match(r"No module named '?([^']+)'?|(?:module|type object) '.*' has no attribute '(.*)'", cause):
        return f"{path}: cannot import {match[1] or match[2]}", hint
    if match := re.match(r"Expected an? (.*?)(?:\. Got value: (.*))?$", cause, re.DOTALL):
        # Of a union, the innermost cause is only the first member: all of them are what was expected.
        expected = " or ".join(union) if len(union) > 1 else _plain(match[1])
        return _wrong_value(path, expected, match[2] or given), hint
    if match := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", cause):
        choices = re.findall(r"[\w-]+", match[2])
        return f"there is no command '{match[1]}'{_near(match[1], choices)}", f"Commands: {', '.join(choices)}"
    if match := re.search(r'expected "subcommand" to be one of \{(.*)\}', cause):
        return "which command? None was given", f"Commands: {match[1].replace(',', ', ')}"
    if cause.startswith("the following arguments are required"):
        missing = [key.split(".", 1)[-1] for key in cause.partition(": ")[2].split(", ")]
        return f"no value for {' and '.join(missing)}, usually given by --config FILE", hint
    if match := re.match(r"File does not exist: '?(.*?)'?$", cause):
        return _missing_file(match[1], path), hint
    if mark := getattr(_innermost(error), "problem_mark", None):
        return f"a config file is not valid YAML near line {mark.line + 1}: {_innermost(error).problem}", hint
    return ": ".join(filter(None, [path, re.sub(r"\s+", " ", cause)])), hint


def _unknown_key(parser: ArgumentParser, cause: str, keys: list[str], owner: type | None) -> str:
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
    where = ".".join([*keys, name])
    said = f"{owner.__name__} has no argument '{name}' ({where})" if owner else f"there is no key '{where}'"
    return said + _near(name, valid)


def _unknown_class(name: str, path: str, union: list[str]) -> str:
    # `list[Callback]` and `Callback` name the same base.
    bases = dict.fromkeys(re.findall(r"\w+", " ".join(union)))
    choices = {choice for base in bases for choice in _subclasses(base)}
    kind = next((base for base in bases if _subclasses(base)), "class")
    return f"{path}: there is no {kind} '{name}'{_near(name.rpartition('.')[2], choices)}"


def _wrong_value(path: str, expected: str, value: str) -> str:
    choices = re.findall(r"'([^']+)'", expected) if expected.startswith("Literal") else []
    expected = f"one of {', '.join(choices)}" if choices else expected
    return f"{path}: expected {expected}, got {value.strip()!r}{_near(value, choices)}"


def _missing_file(path: str, key: str) -> str:
    return f"{'--config' if key == 'config' else key}: there is no file {os.path.relpath(path)}{nearest_file(path)}"


def nearest_file(path: str) -> str:
    """`; did you mean X?` for the most similar name in the same folder, or nothing."""
    folder, name = os.path.split(os.path.relpath(path))
    siblings = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
    close = difflib.get_close_matches(name, siblings, 1)
    return f"; did you mean {os.path.join(folder, close[0])}?" if close else ""


def arguments(owner: type) -> set[str]:
    """Names of all arguments of a class that a config may set, nested ones dotted."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(owner, fail_untyped=False)
    return _options(parser)


def _options(parser: ArgumentParser) -> set[str]:
    return {action.dest for action in parser._actions if action.dest not in {"help", "config", "print_config"}}


def _subclasses(base: str) -> set[str]:
    """Names of the loaded public classes that derive from a class called `base`."""
    found: set[str] = set()
    stack = [cls for cls in object.__subclasses__() if cls.__name__ == base] or _classes_named(base)
    while stack:
        cls = stack.pop()
        stack += type.__subclasses__(cls)
        if not cls.__name__.startswith("_"):
            found.add(cls.__name__)
    return found - {base}


def _classes_named(name: str) -> list[type]:
    modules = [module for module in list(sys.modules.values()) if isinstance(getattr(module, name, None), type)]
    return list({getattr(module, name) for module in modules})


def _near(name: str, valid: Iterable[str]) -> str:
    lower = {choice.lower(): choice for choice in sorted(valid)}
    close = difflib.get_close_matches(str(name).lower(), lower, 1, cutoff=0.6)
    return f"; did you mean '{lower[close[0]]}'?" if close else ""


def _hint(parser: ArgumentParser, keys: list[str], owner: type | None) -> str:
    command = f"python {parser.prog.replace(' [options]', '')}"
    top = keys[0] if keys else ""
    if owner and top in {"model", "data", "trainer.callbacks"} and len(keys) <= 2:
        return f"List choices: {command} --{top}.help={owner.__name__}"
    return f"List choices: {command} --help"


def _causes(message: str, error: BaseException | None) -> Iterator[str]:
    """The messages from the outermost exception to the innermost, repetitions left out."""
    yield message
    last = message
    while error is not None:
        if str(error).strip() != last.strip():
            yield str(error)
        last = str(error)
        error = error.__cause__ or error.__context__


def _innermost(error: BaseException | None) -> BaseException | None:
    while error is not None and (error.__cause__ or error.__context__):
        error = error.__cause__ or error.__context__
    return error


def _plain(types: str) -> str:
    return TYPE_NOISE.sub(lambda match: match[1] or "", types)


def _split(types: str) -> list[str]:
    """Splits at commas outside brackets."""
    return [part.strip() for part in re.split(r",\s*(?![^\[]*\])", types)]


def _import(class_path: str) -> type | None:
    module, _, name = class_path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)
