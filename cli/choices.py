"""What a user may write at a place of the command line or of a config, for near misses and hints."""

import difflib
import re
import sys
from collections.abc import Iterable
from inspect import isabstract, signature

from jsonargparse import ArgumentParser

NO_CHOICES = ("lightning.pytorch.demos", "lightning_modules.core.")  # modules


def arguments(owner: type) -> set[str]:
    """Return the names of all arguments of a class that a config may set; nested ones are dotted."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(owner, fail_untyped=False)
    return options(parser)


def options(parser: ArgumentParser) -> set[str]:
    """Return the names of a parser's options, without the leading dashes."""
    return {action.dest for action in parser._actions} - {"help", "print_config"}


def subclasses(base: str) -> set[str]:
    """Return the names of the loaded public classes that derive from a class named `base` and can be made.

    `lightning_modules.core` has bases for the classes of the lines, which no config names.
    """
    named = [getattr(module, base, None) for module in list(sys.modules.values())]
    stack = [cls for cls in named if isinstance(cls, type) and cls.__module__ != "collections.abc"]
    found = set()
    while stack:
        classes: list[type] = type.__subclasses__(stack.pop())
        stack += classes
        made = [cls for cls in classes if not cls.__module__.startswith(NO_CHOICES)]
        found |= {cls.__name__ for cls in made if not isabstract(cls)}
    return {name for name in found if not name.startswith("_")}


def number_of(types: str) -> str:
    """Return the first argument that is a number, of the class of the project among types; an empty string if none."""
    for name in re.findall(r"\b[A-Z]\w+", types):
        for kind in [getattr(module, name, None) for module in list(sys.modules.values())]:
            if isinstance(kind, type) and kind.__module__.startswith("lightning_modules.") and not isabstract(kind):
                arguments = signature(kind).parameters.values()
                return next((argument.name for argument in arguments if argument.annotation in (float, int)), "")
    return ""


def near(name: str, valid: Iterable[str]) -> str:
    """Return `; did you mean 'X'?` for the most similar of the valid names, or nothing."""
    lower = {choice.lower(): choice for choice in sorted(valid)}
    close = difflib.get_close_matches(name.lower(), lower, 1, cutoff=0.6)
    return f"; did you mean '{lower[close[0]]}'?" if close else ""


def listed(names: Iterable[str]) -> str:
    """Return the names in alphabetical order, of dotted names the first part."""
    return ", ".join(sorted({name.partition(".")[0] for name in names})) or "no arguments"
