"""Where a parsing error of jsonargparse lies.

jsonargparse reports a wrong key or value as nested exceptions, each of which repeats all unions above it. A user needs
what is at the two ends: the keys that lead to the mistake, and the innermost cause.
"""

import ast
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field

KEY = re.compile(r'Parser key "([^"]+)"')
OWNER = re.compile(r"(?:Problem with given |Type \S*Callable.*)class_path[ =]'([^']+)'", re.DOTALL)
SUBTYPES = re.compile(r"^\s*Subtypes: \[(.*)\]$", re.MULTILINE)
VALUE = re.compile(r"^\s*Given value: (.*)$", re.MULTILINE)
TYPE_NOISE = re.compile(r"<class '(?:[\w.]*\.)?(\w+)'>|(?:typing|collections\.abc)\.|(?:[a-z_]\w*\.)+(?=[A-Z])")


@dataclass
class Finding:
    """Where a parsing error lies.

    Attributes:
        cause: The innermost message.
        keys: The keys that lead to it.
        owner: The class whose arguments were being set, if any.
        union: The types that would have been accepted, if there were several.
        value: The value in the command line or the config, as text.
        callbacks: The list of callbacks so far, as text, if the error lies in one of them.
    """

    cause: str
    keys: list[str] = field(default_factory=list)
    owner: type | None = None
    union: list[str] = field(default_factory=list)
    value: str = ""
    callbacks: str = ""

    @property
    def path(self) -> str:
        """The keys, dotted; those of a callback begin with its class, as `trainer.callbacks: QuickEval.n_samples`."""
        first, *rest = self.places or [""]
        if first.startswith("trainer.callbacks") and rest and self.owner:
            return f"{first}: {'.'.join([self.owner.__name__, *rest])}"
        return ".".join(self.places)

    @property
    def places(self) -> list[str]:
        """The keys, with the number of a callback where the list has several of its class: `trainer.callbacks[2]`."""
        number = _unparsed(self.callbacks, self.owner.__name__) if self.owner else None
        return self.keys if number is None else [f"{self.keys[0]}[{number}]", *self.keys[1:]]

    def enter(self, text: str) -> None:
        """Add the message of the next inner level."""
        self.cause = text.strip()
        if match := OWNER.match(self.cause):
            self.owner, self.union = _imported(match[1]), []
        elif (match := KEY.match(self.cause)) and self.keys[-1:] != [match[1]]:
            self.keys.append(match[1])
        if match := SUBTYPES.search(self.cause):
            self.union = [kind for kind in _split(plain(match[1])) if kind != "NoneType"]
            value = VALUE.search(self.cause)
            self.value = value[1] if value else ""
            if self.keys == ["trainer.callbacks"]:
                self.callbacks = self.value


def find(message: str, error: BaseException | None) -> Finding:
    """Follow the chain of causes, and within a union the member that was parsed furthest."""
    finding = Finding(message)
    texts = list(_messages(message, error))
    for text in texts:
        finding.enter(text)
    # The chain holds the first member of a union; another member may have led to a class and its arguments.
    if finding.cause.startswith("Expected a") and (deeper := OWNER.search(texts[-2] if len(texts) > 1 else "")):
        for line in texts[-2][deeper.start() :].splitlines():
            if not re.match(r"\s*(Does not validate|Subtypes: |Errors:)", line):
                finding.enter(line.strip().removeprefix("- "))
                if not OWNER.match(finding.cause) and not KEY.match(finding.cause):
                    break
    return finding


def plain(types: str) -> str:
    """Return the names of types without their modules."""
    return TYPE_NOISE.sub(lambda match: match[1] or "", types)


def _messages(message: str, error: BaseException | None) -> Iterator[str]:
    """Yield the messages from the outermost exception to the innermost, without repetitions."""
    yield message
    last = message
    while error is not None:
        if str(error).strip() != last.strip():
            yield str(error)
        last = str(error)
        error = error.__cause__ or error.__context__


def _split(types: str) -> list[str]:
    """Split at commas outside brackets."""
    parts, depth = [""], 0
    for character in types:
        depth += (character == "[") - (character == "]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts]


def _unparsed(callbacks: str, name: str) -> int | None:
    """Return which callback of a list is not parsed yet, if the list has several of the class; None if it is unknown.

    jsonargparse parses the members in their order and replaces each by a `Namespace`, so that the first mapping is the
    one that it could not parse.

    Args:
        callbacks: The list as Python writes it.
        name: The class.
    """
    try:
        written = ast.parse(callbacks, mode="eval").body
    except (SyntaxError, ValueError):  # an object among the arguments that no text stands for
        return None
    members = written.elts if isinstance(written, ast.List) else []
    of_class = [member for member in members if re.search(rf"class_path\W+([\w.]*\.)?{name}'", ast.unparse(member))]
    numbers = (number for number, member in enumerate(members) if isinstance(member, ast.Dict))
    return next(numbers, None) if len(of_class) > 1 else None


def _imported(class_path: str) -> type | None:
    module, _, name = class_path.rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    return found if isinstance(found, type) else None
