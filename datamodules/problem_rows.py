"""From the rows of a data set to word problems: columns, bare answers, and rows that cannot be used."""

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from decimal import Decimal
from functools import lru_cache

from lightning.pytorch.utilities import rank_zero_warn

from datamodules.answers import GSM8K, LAST_NUMBER, MARK, bare_number, reference_answer
from datamodules.errors import UserError
from datamodules.numerals import last_number
from datamodules.problems import Problem, read_entities
from datamodules.sources import is_broken

LONGEST = 100_000  # characters of a problem, a hundred times a long one
Row = tuple[str, object]  # where the row stands, such as `line 3`; and its values, or the error of a broken row


@dataclass(frozen=True)
class Columns:
    """The columns of a data set with word problems.

    Attributes:
        question: The columns that make up the question, joined by a space.
        answer: The column of the worked answer or of its number.
        answer_format: Where an answer has its final part (see `answers.final_answer`).
    """

    question: tuple[str, ...] = ("question",)
    answer: str = "answer"
    answer_format: str = GSM8K

    @classmethod
    def from_settings(cls, columns: Mapping[str, str | list[str]], answer_format: str) -> "Columns":
        """Read the setting `data.columns`.

        Raises:
            UserError: It names something else than the question and the answer, or no column or several for one.
        """
        for name in columns:
            if name not in ("question", "answer"):
                raise UserError(f"data.columns has no '{name}': its keys are 'question' and 'answer'")
        question, answer = columns.get("question", cls.question), columns.get("answer", cls.answer)
        if not question:
            raise UserError("data.columns.question names no column")
        if not isinstance(answer, str):
            raise UserError(f"data.columns.answer must be one column, not {answer}")
        return cls((question,) if isinstance(question, str) else tuple(question), answer, answer_format)

    def problem(self, row: object) -> Problem:
        """Make a problem of a row.

        Raises:
            UserError: The row lacks a column, or holds what is no question or no answer.
        """
        if not isinstance(row, Mapping):
            raise UserError("no columns, but a value")
        for key, names in (("question", self.question), ("answer", (self.answer,))):
            for name in names:
                if name not in row:
                    raise UserError(_no_column(key, name, tuple(map(str, row))))
        question = " ".join(part for name in self.question if (part := _text(name, row[name]).strip()))
        if not question:
            raise UserError("the question is empty")
        answer = self._answer(row[self.answer])
        if len(question) + len(answer) > LONGEST:
            raise UserError(f"longer than {LONGEST} characters")
        if is_broken(question) or is_broken(answer):
            raise UserError("not a text in UTF-8, or half of a surrogate pair")
        return Problem(question, answer, read_entities(question, answer), answer_format=self.answer_format)

    def _answer(self, value: object) -> str:
        """Return a worked answer as it is, and `#### 9` for the bare number 9."""
        if isinstance(value, list) and len(value) == 1:
            value = value[0]  # some data sets list the solutions of an equation
        if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
            value = str(value)
        text = _text(self.answer, value)
        if MARK not in text and (number := bare_number(text)):
            return f"{MARK} {number}"
        # Any text has a last word, and a reference that holds no number is none in this format
        numberless = self.answer_format == LAST_NUMBER and MARK not in text and last_number(text) is None
        if numberless or reference_answer(text, self.answer_format) is None:
            shown = text if len(text) <= 40 else f"{text[:40]}..."
            form = "" if self.answer_format == GSM8K else f" and none of data.answer_format '{self.answer_format}'"
            raise UserError(f"the answer '{shown}' is no number, and has no '{MARK}'{form}")
        return text


def read_problems(rows: Iterable[Row], source: str, columns: Columns) -> list[Problem]:
    """Make problems of rows; rows that cannot be used are skipped, and one warning counts them and describes the first.

    Args:
        rows: The rows.
        source: The name of the data set and of its setting, for messages.
        columns: The columns to read.

    Raises:
        UserError: No row can be used.
    """
    problems: list[Problem] = []
    broken, place, first = 0, "", ""
    for place, row in rows:
        try:
            if isinstance(row, Exception):
                raise row
            problems.append(columns.problem(row))
        except (ValueError, RecursionError) as error:
            broken += 1
            first = first or f"first {place} ({error})"
    if not problems:
        raise UserError(f"{source} holds no problem: {first or 'it is empty'}")
    if broken:
        unit = place.partition(" ")[0]
        rank_zero_warn(f"{source}: skipped {broken} of {broken + len(problems)} {unit}s, {first}")
    return problems


def _text(name: str, value: object) -> str:
    if value is None:
        raise UserError(f"'{name}' is empty")
    if not isinstance(value, str):
        raise UserError(f"'{name}' is no text, but {value!r:.40}")
    return value


@lru_cache(maxsize=8)  # every row may lack the column
def _no_column(key: str, name: str, found: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(name, found, 1)
    hint = f", did you mean '{close[0]}'?" if close else ""
    shown = ", ".join(map(repr, found[:20])) + (", ..." if len(found) > 20 else "")
    return f"there is no '{name}', only {shown or 'nothing'}: set data.columns.{key}{hint}"
