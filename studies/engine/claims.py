"""Claims: comparisons over the arms of a study in one line, parsed; `judgement` judges them.

value     := operand | difference(operand, operand) | ratio(operand, operand) | rate(operand compare number)
claim     := value compare number | value in [number, number]
compare   := < | <= | > | >=
operand   := arm | arm.measure          (an arm alone means the study's first measure)
"""

import math
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from cli.choices import near
from datamodules.errors import UserError

TOKEN = re.compile(
    r"\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)|(?P<name>[A-Za-z_][\w/]*)|(?P<mark><=|>=|\S))"
)
FUNCTIONS = ["difference", "ratio", "rate"]


@dataclass(frozen=True)
class Region:
    """An interval of the real line.

    Attributes:
        low: Lower end.
        high: Upper end.
        low_open: Whether the lower end lies outside.
        high_open: Whether the upper end lies outside.
    """

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    @staticmethod
    def beyond(compare: str, bound: float) -> "Region":
        """Return the region of all x with `x compare bound`."""
        is_open = "=" not in compare
        if compare.startswith("<"):
            return Region(high=bound, high_open=is_open)
        return Region(low=bound, low_open=is_open)

    def __contains__(self, x: float) -> bool:
        above = x > self.low if self.low_open else x >= self.low
        return above and (x < self.high if self.high_open else x <= self.high)

    def holds(self, low: float, high: float) -> bool:
        """Return whether the closed interval from low to high lies inside."""
        return low in self and high in self

    def misses(self, low: float, high: float) -> bool:
        """Return whether the closed interval from low to high lies outside."""
        return (high not in self and high <= self.low) or (low not in self and low >= self.high)

    def decides(self, low: float, high: float) -> bool:
        """Return whether the closed interval from low to high lies inside or outside, and not on a bound."""
        return self.holds(low, high) or self.misses(low, high)


@dataclass(frozen=True)
class Operand:
    """A measure of an arm."""

    arm: str
    measure: str


@dataclass(frozen=True)
class Claim:
    """A parsed claim.

    Attributes:
        id: The claim's number in the ledger, or any name.
        text: The claim as written in the study.
        function: `mean`, `difference`, `ratio` or `rate`: how the operands' values over seeds become one value.
        operands: One operand, or two for `difference` and `ratio`.
        region: Where that value must lie for the claim to hold.
        condition: For `rate`: where a seed's value must lie for the seed to count; None for every other function.
    """

    id: str
    text: str
    function: str
    operands: tuple[Operand, ...]
    region: Region
    condition: Region | None = None


class ClaimError(UserError):
    """A claim that cannot be read; the message is a sentence, the claim, and a caret under the fault."""

    def __init__(self, name: str, text: str, column: int, problem: str):
        super().__init__(f"claims.{name}: {problem}\n  {text}\n  {' ' * column}^")


class _Parser:
    """Recursive descent over the tokens of one claim: (kind, text, column)."""

    def __init__(self, name: str, text: str, arms: Collection[str], measures: Sequence[str]):
        self.name, self.text, self.arms, self.measures = name, text, arms, measures
        self.tokens: list[tuple[str, str, int]] = []
        for match in TOKEN.finditer(text.rstrip()):
            kind = match.lastgroup or ""
            self.tokens.append((kind, match[kind], match.start(kind)))
        self.tokens.append(("end", "the end", len(text.rstrip())))
        self.next = 0

    def fail(self, problem: str, column: int | None = None) -> ClaimError:
        return ClaimError(self.name, self.text, self.column if column is None else column, problem)

    @property
    def token(self) -> tuple[str, str]:
        return self.tokens[self.next][:2]

    @property
    def column(self) -> int:
        return self.tokens[self.next][2]

    def take(self, kind: str, expected: str, values: Collection[str] = ()) -> str:
        if self.token[0] != kind or (values and self.token[1] not in values):
            raise self.fail(f"expected {expected}, not {self.token[1]}")
        self.next += 1
        return self.tokens[self.next - 1][1]

    def claim(self) -> Claim:
        function, operands, condition = self.value()
        if self.token == ("name", "in"):
            self.next += 1
            region = self.between()
        else:
            region = self.comparison("<, <=, >, >= or in")
        if self.token[0] != "end":
            raise self.fail(f"expected the end of the claim, not {self.token[1]}")
        return Claim(self.name, self.text, function, operands, region, condition)

    def value(self) -> tuple[str, tuple[Operand, ...], Region | None]:
        (kind, name), following = self.token, self.tokens[self.next + 1 : self.next + 2]
        if kind != "name" or not following or following[0][1] != "(":
            return "mean", (self.operand(),), None
        if name not in FUNCTIONS:
            raise self.fail(f"there is no function {name}{near(name, FUNCTIONS)}: {', '.join(FUNCTIONS)}")
        self.next += 2
        operands, condition = [self.operand()], None
        if name == "rate":
            condition = self.comparison("<, <=, > or >=")
        else:
            self.take("mark", "','", ",")
            operands.append(self.operand())
        self.take("mark", "')'", ")")
        return name, tuple(operands), condition

    def operand(self) -> Operand:
        column = self.column
        arm = self.take("name", "an arm")
        if arm not in self.arms:
            raise self.fail(f"there is no arm {arm}{near(arm, self.arms)}", column)
        if self.token != ("mark", "."):
            return Operand(arm, self.measures[0])
        self.next += 1
        column = self.column
        word = self.take("name", "a measure")
        if word in self.measures:
            return Operand(arm, word)
        matching = [measure for measure in self.measures if measure.rpartition("/")[2] == word]
        if len(matching) == 1:
            return Operand(arm, matching[0])
        if matching:
            raise self.fail(f"{word} may be {' or '.join(matching)}: write it in full", column)
        short = [measure.rpartition("/")[2] for measure in self.measures]
        raise self.fail(f"the study measures no {word}{near(word, [*short, *self.measures])}", column)

    def comparison(self, expected: str) -> Region:
        compare = self.take("mark", expected, ("<", "<=", ">", ">="))
        return Region.beyond(compare, float(self.take("number", "a number")))

    def between(self) -> Region:
        self.take("mark", "'['", "[")
        low = float(self.take("number", "a number"))
        self.take("mark", "','", ",")
        column = self.column
        high = float(self.take("number", "a number"))
        if high < low:
            raise self.fail(f"the interval is empty: {high:g} is below {low:g}", column)
        self.take("mark", "']'", "]")
        return Region(low, high)


def parse(name: str, text: str, arms: Collection[str], measures: Sequence[str]) -> Claim:
    """Read a claim.

    Args:
        name: The claim's id, for error messages.
        text: The claim.
        arms: Names of the study's arms.
        measures: The study's measures; a claim may name one by the part after its last `/`.

    Raises:
        ClaimError: The claim does not follow the grammar, or names an arm or a measure that does not exist.
    """
    return _Parser(name, text, arms, measures).claim()
