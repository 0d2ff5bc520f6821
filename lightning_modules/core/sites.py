"""Modules and parameters addressed by name pattern, as every intervention and monitor does.

Patterns are those of `fnmatch`; `*` also crosses dots, so `blocks.*.q_proj` matches `blocks.0.attn.q_proj`. A pattern
is compared with whole names first. If no whole name matches, it is compared with the ends of names that begin after a
dot: `final_norm` then finds `network.final_norm`, and a config need not know under which attribute a module keeps its
network.
"""

from collections.abc import Iterable, Mapping
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import TypeVar

from torch import nn

from datamodules.errors import UserError

T = TypeVar("T")


def match_modules(module: nn.Module, patterns: str | Iterable[str], where: str = "") -> dict[str, nn.Module]:
    """Return the submodules whose names match any of the patterns, by name, in the order of `named_modules`.

    A submodule with several names appears once, under its first matching name. `where` names the setting that holds the
    patterns, for the message.

    Raises:
        UserError: A pattern matches nothing; the message lists the nearest names.
    """
    named = {name: child for name, child in module.named_modules(remove_duplicate=False) if name}
    return _match(named, patterns, "module", where)


def match_parameters(module: nn.Module, patterns: str | Iterable[str], where: str = "") -> dict[str, nn.Parameter]:
    """Return the parameters whose names match any of the patterns, by name, in the order of `named_parameters`.

    A shared parameter (tied embeddings) matches by each of its names and appears once, under the first that matches.
    `where` names the setting that holds the patterns, for the message.

    Raises:
        UserError: A pattern matches nothing; the message lists the nearest names.
    """
    return _match(dict(module.named_parameters(remove_duplicate=False)), patterns, "parameter", where)


def _match(named: Mapping[str, T], patterns: str | Iterable[str], kind: str, where: str) -> dict[str, T]:
    chosen: set[str] = set()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        names = [name for name in named if fnmatchcase(name, pattern)]
        names = names or [name for name in named if fnmatchcase(name, f"*.{pattern}")]
        if not names:
            nearest = ", ".join(map(repr, get_close_matches(pattern, named, n=5, cutoff=0.0)))
            nothing = f"{where}: no" if where else "No"
            raise UserError(f"{nothing} {kind} matches {pattern!r}; the nearest names are: {nearest or 'none at all'}.")
        chosen.update(names)

    matched: dict[str, T] = {}
    seen: set[int] = set()
    for name, value in named.items():
        if name in chosen and id(value) not in seen:
            seen.add(id(value))
            matched[name] = value
    return matched
