"""Numbers as people and models write them, and the final answers of references and outputs."""

from decimal import Decimal

import pytest

from datamodules.answers import bare_number, check_format, final_answer, reference_answer
from datamodules.errors import UserError
from datamodules.numerals import last_number, leading_number, numbers_in
from datamodules.problems import Problem

NUMBERS = {
    "It costs $18.": "18",
    "18km, 5%, 3rd, x7": "18 5 3 7",
    "€5 £6 ¥7 ₹8 US$9 ＄１０ 11€": "5 6 7 8 9 10 11",
    "1,234,567 and 12,34,567.50": "1234567 1234567.5",
    "1\u00a0234 2\u202f345\u202f678 3\u2009000 １，２００": "1234 2345678 3000 1200",
    "1 234": "1 234",  # two numbers, unless the space divides thousands beyond doubt
    "$409 500 of 5 650 000": "409500 5650000",
    "1,2 1,2345 0,123 1,234,56": "1 2 1 2345 0 123 1 234 56",
    ".5 0.50 00.5 1.50 2.": "0.5 0.5 0.5 1.5 2",
    "the end.5 more, 1.2.3": "5 1.2 3",
    "1.5e3 2E-2 1e+2 2×10^5 1.5 x 10⁶ 3 x 10": "1500 0.02 100 200000 1500000 3 10",
    "10-5, 10 -5, (2)-5, 5%-3, x-5": "10 5 10 5 2 5 5 3 5",
    "pages 3-5, 3–5, 20-year-old": "3 5 3 5 20",
    "-5, −5, －５, –5, (-5), 3*-5=-15": "-5 -5 -5 -5 -5 3 -5 -15",
    "-$5, $-5, −€1,000, $5-$3": "-5 -5 -1000 5 3",
    "3 - 5 — 7": "3 5 7",
    "3/4, ½, 2½": "3 4 1 2 2 1 2",
    "-0 0.00 m² 5²": "0 0 5",
    "٣٫٥ १२": "3.5 12",
    "1e99999 " + "9" * 30: "9" * 30,
}


@pytest.mark.parametrize("text", NUMBERS)
def test_numbers_in_texts(text):
    assert numbers_in(text) == NUMBERS[text].split()
    assert all(f"{Decimal(number):f}" == number for number in numbers_in(text))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        *(("3/4", "0.75"), ("2 1/2", "2.5"), ("2½", "2.5"), ("-2 1/2", "-2.5"), ("2/6", "1/3"), ("-1/3", "-1/3")),
        *(("**18**", "18"), ("= $18.00.", "18"), ("- 5", "-5"), ("-US$5", "-5"), ("-> .5", "0.5"), ("18cm^2", "18")),
        *(("8:30", None), ("10-5", None), ("9*2=18", None), ("1.234,5", None), ("3/0", None), ("7/10/2020", None)),
        *(("about 18", None), ("", None), ("1/" + "9" * 9999, None)),
    ],
)
def test_a_number_at_the_beginning(text, number):
    assert leading_number(text) == number


def test_the_last_number():
    assert last_number("It is 24/2=12, so 3/4 of them: 9.") == "9"
    assert last_number("He eats 3/4 of 1") == "1"
    assert last_number("He eats 3/4.") == "0.75"
    assert last_number("none") is None


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        *(("#### 18", "18"), ("####18", "18"), ("so it is\n#### 18.00", "18"), ("####\n18", "18")),
        *(("#### $1,234.50.", "1234.5"), ("#### $ 7", "7"), ("#### -$2,000", "-2000"), ("#### 25%.", "25")),
        *(("#### 007", "7"), ("#### 18 dollars", "18"), ("#### 18 of 20", "18"), ("#### 1000000.0", "1000000")),
        ("#### 123456789012345678901234567890", "123456789012345678901234567890"),
        *(("#### vefiba.", "vefiba"), ("#### **vefiba**", "vefiba"), ("#### New  York!\nin 2", "New  York")),
        *(("#### 1e999999999", "1e999999999"), ("#### 10-5", "10-5"), ("#### The 5", "The 5")),
        ("#### 1\n\nQuestion: 1+1?\nAnswer: #### 2", "1"),
        *(("18", None), ("####", None), ("#### $", None), ("", None)),
    ],
)
def test_final_answer(written, answer):
    assert final_answer(written) == answer


@pytest.mark.parametrize(
    ("answer", "wanted"), [("1234567", "1234568"), ("100000", "100001"), ("0.5", "0.51"), ("-3", "3"), ("8:45", "8:30")]
)
def test_different_answers_are_different(answer, wanted):
    assert not Problem("", f"#### {wanted}").is_correct(f"#### {answer}")
    assert Problem("", f"#### {wanted}").is_correct(f"#### {wanted}")


def test_an_output_without_an_answer_is_wrong():
    assert not Problem("", "#### 5").is_correct("it is 5")
    assert not Problem("", "no answer").is_correct("no answer")


@pytest.mark.parametrize("reference", ["2*9=<<2*9=18>>18\n#### 18", "18", "In 2 days it is\n####$18.00"])
@pytest.mark.parametrize(
    ("answer_format", "output"),
    [
        ("gsm8k", "#### 18"),
        ("last_number", "9 times 2, so 18 apples."),
        ("(?i)answer is:? (.+)", "The answer is: $18, not 7. The answer is 5."),
    ],
)
def test_formats_of_outputs(reference, answer_format, output):
    problem = Problem("", reference, answer_format=answer_format)
    assert problem.is_correct(output)
    assert not problem.is_correct(output.replace("18", "19"))
    assert not problem.is_correct("Eighteen")


def test_words_as_answers():
    word = Problem("", "The word is vefiba.\n#### vefiba", answer_format="last_number")
    assert word.is_correct("The word of Ann is vefiba.")
    assert not word.is_correct("The word of Ann is vefibo.")
    assert reference_answer("It is B, not 7", "is ([A-D])") == "B"


@pytest.mark.parametrize(
    ("answer_format", "reason"),
    [("gsm8", "has 0 groups"), ("(a)(b)", "has 2 groups"), ("(", "no regular expression"), ("", "has 0 groups")],
)
def test_a_format_that_is_none(answer_format, reason):
    with pytest.raises(UserError, match=f"^data.answer_format '.*{reason}.*: use 'gsm8k', 'last_number' or a reg"):
        check_format(answer_format)


def test_bare_numbers():
    bare = {"145.0": "145", "9 (apples)": "9", "-1,000": "-1000", "3/4": "0.75", "$5.50 per cup": "5.5"}
    assert {text: bare_number(text) for text in bare} == bare
    assert not any(map(bare_number, ("9 apples; 7 pears", "8:30", "3 + 4 = 7", "yes", "about 9", "")))
