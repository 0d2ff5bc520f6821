"""Claims: one-line comparisons over the arms of a study, parsed and weighed.

value     := operand | difference(operand, operand) | ratio(operand, operand) | rate(operand compare number)
claim     := value compare number | value in [number, number]
compare   := < | <= | > | >=
operand   := arm | arm.measure          (an arm alone means the study's first measure)
"""

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Literal

from studies.engine.statistics import Estimate, Series, difference, mean, rate, ratio, seeds_to_decide

Verdict = Literal["held", "refuted", "undecided"]
TOKEN = re.compile(
    r"\s*(?:(?P<number>[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)|(?P<name>[A-Za-z_][\w/]*)|(?P<mark><=|>=|\S))"
)
FUNCTIONS = {"difference": difference, "ratio": ratio, "rate": rate}


@dataclass(frozen=True)
class Region:
    """An interval of the real line; ends may be open."""

    low: float = -math.inf
    high: float = math.inf
    low_open: bool = False
    high_open: bool = False

    @staticmethod
    def beyond(compare: str, bound: float) -> "Region":
        """The region that `x compare bound` describes."""
        is_open = "=" not in compare
        if compare.startswith("<"):
            return Region(high=bound, high_open=is_open)
        return Region(low=bound, low_open=is_open)

    def __contains__(self, x: float) -> bool:
        above = x > self.low if self.low_open else x >= self.low
        return above and (x < self.high if self.high_open else x <= self.high)

    def holds(self, low: float, high: float) -> bool:
        """Whether the closed interval lies inside."""
        return low in self and high in self

    def misses(self, low: float, high: float) -> bool:
        """Whether the closed interval lies outside."""
        return (high not in self and high <= self.low) or (low not in self and low >= self.high)

    def decides(self, low: float, high: float) -> bool:
        """Whether the closed interval lies on one side."""
        return self.holds(low, high) or self.misses(low, high)


@dataclass(frozen=True)
class Operand:
    """A measure of an arm; `measure` is None where the claim names the arm alone."""

    arm: str
    measure: str | None = None


@dataclass(frozen=True)
class Claim:
    """A parsed claim.

    Attributes:
        id: Its number in the ledger, or any name.
        text: What was written.
        function: What is taken of the operands' values over seeds.
        operands: One or two.
        region: Where the value must lie for the claim to hold.
        condition: For `rate`: what each seed's value must satisfy to be counted.
    """

    id: str
    text: str
    function: Literal["mean", "difference", "ratio", "rate"]
    operands: tuple[Operand, ...]
    region: Region
    condition: Region | None = None


@dataclass(frozen=True)
class Judgement:
    """What the runs say about a claim."""

    verdict: Verdict
    estimate: Estimate
    note: str


class ClaimError(ValueError):
    """A claim that cannot be read: the sentence, the claim, and a caret at the fault."""

    def __init__(self, where: str, text: str, column: int, problem: str):
        super().__init__(f"claims.{where}: {problem}\n  {text}\n  {' ' * column}^")


class _Parser:
    """Recursive descent over the tokens of one claim."""

    def __init__(self, name: str, text: str, arms: Collection[str], measures: Sequence[str]):
        self.name, self.text, self.arms, self.measures = name, text, arms, measures
        matches = TOKEN.finditer(text.rstrip())
        self.tokens = [(m.lastgroup, m[m.lastgroup], m.start(m.lastgroup)) for m in matches]
        self.next = 0

    def fail(self, problem: str, column: int | None = None) -> ClaimError:
        return ClaimError(self.name, self.text, self.column if column is None else column, problem)

    @property
    def token(self) -> tuple[str, str]:
        return self.tokens[self.next][:2] if self.next < len(self.tokens) else ("end", "the end")

    @property
    def column(self) -> int:
        return self.tokens[self.next][2] if self.next < len(self.tokens) else len(self.text.rstrip())

    def take(self, kind: str, what: str, values: Collection[str] = ()) -> str:
        if self.token[0] != kind or (values and self.token[1] not in values):
            raise self.fail(f"expected {what}, not {self.token[1]}")
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
        name, calls = self.token[1], self.tokens[self.next + 1 : self.next + 2]
        if self.token[0] != "name" or not calls or calls[0][1] != "(":
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
        fitting = [measure for measure in self.measures if measure.rpartition("/")[2] == word]
        if len(fitting) == 1:
            return Operand(arm, fitting[0])
        if fitting:
            raise self.fail(f"{word} may be {' or '.join(fitting)}: write it in full", column)
        short = [measure.rpartition("/")[2] for measure in self.measures]
        raise self.fail(f"the study measures no {word}{near(word, [*short, *self.measures])}", column)

    def comparison(self, what: str) -> Region:
        compare = self.take("mark", what, ("<", "<=", ">", ">="))
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


def near(name: str, choices: Collection[str]) -> str:
    """`; did you mean X?` for the most similar choice, or nothing."""
    close = get_close_matches(name, list(choices), 1)
    return f"; did you mean {close[0]}?" if close else ""


def parse(name: str, text: str, arms: Collection[str], measures: Sequence[str]) -> Claim:
    """Read a claim.

    Args:
        name: Its id, for the message.
        text: The claim.
        arms: The arms that there are.
        measures: The study's measures; a claim may name them by their last part.

    Raises:
        ClaimError: The claim does not follow the grammar, or names an arm or a measure that does not exist.
    """
    return _Parser(name, text, arms, measures).claim()


def judge(claim: Claim, values: Mapping[str, Mapping[str, Series]]) -> Judgement:
    """Weigh a claim: held if the 95 % interval lies in its region, refuted if outside, else undecided.

    Args:
        claim: The claim.
        values: Arm -> measure -> seed -> what was measured.
    """
    series = [values[operand.arm][operand.measure] for operand in claim.operands]
    missing = [operand.arm for operand, seeds in zip(claim.operands, series, strict=True) if not seeds]
    if missing:
        return Judgement("undecided", Estimate(math.nan), f"no finished run of {' or '.join(missing)}")
    diverged = [
        f"{operand.arm}, seed {seed}"
        for operand, seeds in zip(claim.operands, series, strict=True)
        for seed, measured in seeds.items()
        if math.isnan(measured.value)
    ]
    if diverged and claim.function != "rate":  # a rate counts them as seeds that do not satisfy its condition
        return Judgement("undecided", Estimate(math.nan), f"no value in {'; '.join(diverged)}")
    match claim.function:
        case "mean":
            estimate = mean(*series)
        case "rate":
            estimate = rate(series[0], claim.condition.__contains__)
        case _:
            estimate = FUNCTIONS[claim.function](*series)
    if claim.region.holds(estimate.low, estimate.high):
        return Judgement("held", estimate, estimate.note)
    if claim.region.misses(estimate.low, estimate.high):
        return Judgement("refuted", estimate, estimate.note)
    needed = seeds_to_decide(estimate, claim.region.decides)
    return Judgement("undecided", estimate, "; ".join(note for note in (estimate.note, needed) if note))
