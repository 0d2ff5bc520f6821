"""Numbers in texts: one parser for reference answers, for outputs of models and for entities.

Numbers are compared by value. A number is therefore given in one plain form, `1000` for `1,000`, `$1000.00` and `1e3`.
"""

import re
import unicodedata
from decimal import Context, Decimal, Inexact, localcontext
from fractions import Fraction
from re import Match

_CURRENCY = "$¢-¥₠-⃏"
_UNIT = rf"(?:[A-Z]{{0,3}}[{_CURRENCY}][ ]?)"  # before a number, such as `US$`
_NO_BREAK = "\u00a0\u2007\u2009\u202f"  # spaces within a number: no-break, figure, thin, narrow no-break
_LONGEST_POWER = 3  # digits of an exponent; a larger one is no quantity, and its plain form would fill the memory

# Other forms of the signs in numbers. An em dash is punctuation and never a minus.
_SIGNS = dict.fromkeys("‐‑‒–−﹣－", "-") | {"＋": "+", "，": ",", "٬": ",", "．": ".", "٫": ".", "／": "/", "⁄": "/"}
_SIGNS |= {"＄": "$", "﹩": "$", "￠": "¢", "￡": "£", "￥": "¥", "￦": "₩", "％": "%", "：": ":"}
_SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")

# A space divides thousands after a sign of currency (`$409 500`) or before `000` (`5 650 000`), else two numbers
_SPACED = r"(?(currency)[1-9][0-9]{0,2}(?:[ ][0-9]{3})+|[1-9][0-9]{0,2}(?:[ ][0-9]{3})*[ ]000)(?![0-9])"
_NUMBER = re.compile(
    rf"""
    (?=[{_CURRENCY}A-Z.0-9-])  # refuses most positions of a text at once
    # `10-5`, `10 -5`, `(2)-5`, `pages 3-5`, `5$-3$`: a minus after a number or a letter is an operator or a hyphen
    (?P<minus>(?<![\w)\]}}%-])(?<![0-9)\]}}%][ ])(?<![0-9][{_CURRENCY}])-)?
    (?P<currency>{_UNIT})?
    (?P<inner>(?<=[{_CURRENCY} ])(?<![0-9][{_CURRENCY}])(?<![0-9][ ])-)?
    (?:
        (?P<whole>
            [1-9][0-9]{{0,2}}(?P<comma>[,{_NO_BREAK}])[0-9]{{3}}(?:(?P=comma)[0-9]{{3}})*(?![,{_NO_BREAK}]?[0-9])
            | [1-9][0-9]?(?:,[0-9]{{2}})+,[0-9]{{3}}(?!,?[0-9])  # Indian groups: 12,34,567
            | {_SPACED}
            | [0-9]+
        )
        (?P<part>\.[0-9]+)?
        | (?<![\w.])(?P<only_part>\.[0-9]+)
    )
    (?: [eE](?P<power>[-+]?[0-9]+)
        | [ ]?[x×][ ]?10(?: \^\{{?(?P<raised>[-+]?[0-9]+)\}}? | (?P<high>[⁻⁺]?[⁰¹²³⁴-⁹]+) ) )?
    """,
    re.VERBOSE,
)
# What follows the first number of a fraction: `/4` of `3/4`, ` 1/2` of `2 1/2`
_FRACTION = re.compile(r"(?:[ ](?P<above>[0-9]{1,50}))?/(?P<below>(?!0+\b)[0-9]{1,50})(?![./:]?[0-9])")
_GLUED = re.compile(r"[^\w\s#]+[0-9]")  # `8:30`, `10-5`: more numbers after the first, so it is no number
_MARKS = re.compile(rf"(?:[^\w{_CURRENCY}.-]|_|\.(?![0-9])|-(?!\s*{_UNIT}?[0-9.]))*")
_LONE_MINUS = re.compile(rf"-\s+(?={_UNIT}?[0-9.])")


def numbers_in(text: str) -> list[str]:
    """Return the numbers of a text in their plain form, in order.

    Marks and units may touch a number (`$18.`, `18km`); `5%` is 5. All decimal digits of Unicode are digits. Commas and
    no-break or thin spaces divide thousands; a comma between other digits divides numbers, as in `1,2`. A minus belongs
    to the number that it touches, unless a number, a letter or a closing bracket comes before: `10-5` is 10 and 5. A
    fraction such as `3/4` is its two numbers, because worked answers write divisions so.
    """
    values = (_value(match) for match in _NUMBER.finditer(_with_ascii_digits(text)))
    return [_plain(value) for value in values if value is not None]


def leading_number(text: str) -> str | None:
    """Return the number that a text begins with, marks aside, in its plain form; None if it begins otherwise.

    A fraction is one number here: `3/4` is 0.75, and `2 1/2` is 2.5. `8:30` and `10-5` are no numbers.
    """
    text = _with_ascii_digits(text)
    text = _LONE_MINUS.sub("-", _MARKS.sub("", text, count=1), count=1)
    match = _NUMBER.match(text)
    if match is None:
        return None
    number, end = _with_fraction(match)
    return None if _GLUED.match(text, end) else number


def last_number(text: str) -> str | None:
    """Return the last number of a text in its plain form, a fraction as one number; None if there is no number."""
    text, end, last = _with_ascii_digits(text), 0, None
    while match := _NUMBER.search(text, end):
        number, end = _with_fraction(match)
        last = number or last
    return last


def _with_fraction(match: Match[str]) -> tuple[str | None, int]:
    """Return the number, with a fraction that follows it, and where it ends in the text."""
    value, fraction = _value(match), _FRACTION.match(match.string, match.end())
    if value is None:
        return None, match.end()
    if fraction is None or len(match[0]) > 50:  # digits; a longer fraction cannot be written
        return _plain(value), match.end()
    exact = Fraction(value) / int(fraction["below"])
    if fraction["above"]:
        share = Fraction(int(fraction["above"]), int(fraction["below"]))
        exact = Fraction(value) + (-share if value.is_signed() else share)
    return _plain_fraction(exact), fraction.end()


def _value(match: Match[str]) -> Decimal | None:
    """Return the value of a number, or None if its exponent is too large."""
    power = match["power"] or match["raised"] or (match["high"] or "0").translate(_SUPERSCRIPTS)
    if len(power.lstrip("+-")) > _LONGEST_POWER:
        return None
    whole = re.sub("[^0-9]", "", match["whole"] or "0")
    sign = "-" if match["minus"] or match["inner"] else ""
    return Decimal(f"{sign}{whole}{match['part'] or match['only_part'] or ''}e{power}")


def _plain(value: Decimal) -> str:
    """Return a number without exponent, trailing zeros and a sign of zero."""
    text = f"{value:f}"
    text = text.rstrip("0").rstrip(".") if "." in text else text
    return "0" if text == "-0" else text


def _plain_fraction(value: Fraction) -> str:
    """Return a fraction as a decimal number, or in lowest terms if its decimal number does not end."""
    with localcontext(Context(prec=100)) as context:
        decimal = Decimal(value.numerator) / value.denominator
        return str(value) if context.flags[Inexact] else _plain(decimal)


def _with_ascii_digits(text: str) -> str:
    """Return a text with the digits and signs of ASCII, and with `½` as ` 1/2`."""
    return text if text.isascii() else "".join(letter if letter.isascii() else _ascii(letter) for letter in text)


def _ascii(letter: str) -> str:
    if letter.isdecimal():
        return str(unicodedata.decimal(letter))
    if unicodedata.decomposition(letter).startswith("<fraction>"):
        return " " + unicodedata.normalize("NFKC", letter).replace("⁄", "/")
    return _SIGNS.get(letter, letter)
