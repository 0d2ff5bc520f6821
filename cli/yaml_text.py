"""Checks of a YAML text: what YAML allows and a config must not hold."""

from dataclasses import dataclass, field
from typing import cast

import yaml
from yaml.error import Mark

LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
MOST_VALUES = 100_000  # of a config, with aliases written out
DEEPEST = 100  # levels


@dataclass
class _Open:
    """A mapping or a list that has begun.

    Attributes:
        anchor: Its anchor, by which an alias may name it.
        keys: The keys of a mapping so far; None for a list.
        at_key: Whether a key of the mapping comes next.
        values: Number of values in it.
    """

    anchor: str | None
    keys: set[str] | None
    at_key: bool = True
    values: int = 1


@dataclass
class _Reader:
    """The state between two events of a parser.

    Attributes:
        opened: The mappings and lists that have begun, outermost first.
        sizes: Anchor -> number of values.
    """

    opened: list[_Open] = field(default_factory=lambda: [_Open(None, None)])
    sizes: dict[str, int] = field(default_factory=dict)

    def read(self, event: yaml.Event) -> str | None:
        """Take the next event, and return what is wrong with it."""
        match event:
            case yaml.CollectionEndEvent():
                closed = self.opened.pop()
                return self._add(closed.values, closed.anchor)
            case yaml.AliasEvent(anchor=anchor):
                if any(outer.anchor == anchor for outer in self.opened):
                    return f"the alias *{anchor} stands inside what it names"
                return self._key(None) or self._add(self.sizes.get(str(anchor), 1), None)
            case yaml.ScalarEvent(anchor=anchor, value=value):
                return self._key(value) or self._add(1, anchor)
            case yaml.CollectionStartEvent(anchor=anchor):
                wrong = self._key(None)
                self.opened.append(_Open(anchor, set() if isinstance(event, yaml.MappingStartEvent) else None))
                return wrong or (f"more than {DEEPEST} levels" if len(self.opened) > DEEPEST else None)
        return None

    def _key(self, key: str | None) -> str | None:
        """Note that a value begins; `key` is its text if it may be a key."""
        owner = self.opened[-1]
        if owner.keys is None:
            return None
        is_key, owner.at_key = owner.at_key, not owner.at_key
        if not is_key or key is None or key == "<<":
            return None
        if key in owner.keys:
            return f"the key '{key}' occurs twice"
        owner.keys.add(key)
        return None

    def _add(self, values: int, anchor: str | None) -> str | None:
        if anchor is not None:
            self.sizes[anchor] = values
        self.opened[-1].values += values
        return f"more than {MOST_VALUES} values" if self.opened[-1].values > MOST_VALUES else None


def check_text(text: str) -> None:
    """Check a YAML text before it is loaded.

    Raises:
        yaml.MarkedYAMLError: A mapping has one key twice, of which YAML would take the last; an alias stands inside
            what it names; or there are too many values or levels. Other errors are those of the parser.
    """
    reader = _Reader()
    for event in yaml.parse(text, Loader=LOADER):
        if wrong := reader.read(event):
            raise yaml.MarkedYAMLError(problem=wrong, problem_mark=cast(Mark, event.start_mark))
