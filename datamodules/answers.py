"""Final answers: where they stand in a reference or in a model's output, and when two are the same."""

import re

from datamodules.errors import UserError
from datamodules.numerals import last_number, leading_number

MARK = "####"  # GSM8K's mark of the final answer
GSM8K, LAST_NUMBER = "gsm8k", "last_number"
_WORD = re.compile(r"\w(?:\S*\w)?")
_LINE = re.compile(r"\w(?:.*\w)?")  # without marks around it


def check_format(answer_format: str) -> None:
    """Check a setting of `data.answer_format`.

    Raises:
        UserError: It is neither a name of a format nor a regular expression with one group.
    """
    if answer_format in (GSM8K, LAST_NUMBER):
        return
    wanted = f"use '{GSM8K}', '{LAST_NUMBER}' or a regular expression with one group, such as 'answer is (.+)'"
    try:
        groups = re.compile(answer_format).groups
    except (re.error, OverflowError, RecursionError) as error:
        raise UserError(f"data.answer_format '{answer_format}' is no regular expression ({error}): {wanted}") from error
    if groups != 1:
        raise UserError(f"data.answer_format '{answer_format}' has {groups} groups: {wanted}")


def final_answer(text: str, answer_format: str = GSM8K) -> str | None:
    """Return the final answer of a model's output, or None if it has none.

    A number is given in its plain form, so that `$1,000.00` and `1000` are the same answer (see `numerals`); what
    follows the number does not count. Any other answer is the rest of its line, without marks around it.

    Args:
        text: The output.
        answer_format: `gsm8k`: what follows the first `####`. A model that goes on with other problems is therefore
            scored on the first one. `last_number`: the last number, or the last word of a text without numbers. Else
            the first match of a regular expression with one group: what the group holds.
    """
    if answer_format == LAST_NUMBER:
        number, words = last_number(text), _WORD.findall(text)
        return number or (words[-1] if words else None)
    if answer_format == GSM8K:
        return _first(text.partition(MARK)[2])
    match = re.search(answer_format, text)
    return _first(match[1] or "") if match else None


def reference_answer(text: str, answer_format: str = GSM8K) -> str | None:
    """Return the final answer of a reference, or None if it has none.

    A custom format goes first. In a reference without it, and for the other formats, the answer follows `####`, so that
    GSM8K's references serve for outputs that are written in another way. A bare number is the answer in any format.
    """
    if answer_format not in (GSM8K, LAST_NUMBER) and (answer := final_answer(text, answer_format)):
        return answer
    return final_answer(text) if MARK in text else bare_number(text) or final_answer(text, answer_format)


def bare_number(text: str) -> str | None:
    """Return the number of a text that is only a number with its unit, such as `9 (apples)`; else None."""
    number = leading_number(text)
    return number if number and number == last_number(text) else None


def _first(text: str) -> str | None:
    line = _LINE.search(text)
    return leading_number(text) or (line[0] if line else None)
