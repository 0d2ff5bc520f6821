"""Claims: what is written is what is weighed, and a malformed one is shown where it goes wrong."""

import math

import pytest

from studies.engine.claims import ClaimError, Region, parse
from studies.engine.judgement import judge
from studies.engine.statistics import Measured

ARMS = ["control", "constraint", "naive"]
MEASURES = ["test/accuracy", "test/a_act", "validation/loss", "heldout/a_act"]


def read(text):
    return parse("000-01", text, ARMS, MEASURES)


@pytest.mark.parametrize(
    ("text", "function", "operands", "region"),
    [
        ("naive.accuracy < 0.05", "mean", [("naive", "test/accuracy")], Region(high=0.05, high_open=True)),
        ("naive.loss>=-1e-3", "mean", [("naive", "validation/loss")], Region(low=-0.001)),
        ("difference(control, naive) > 0", "difference", [(a, "test/accuracy") for a in ("control", "naive")],
         Region(low=0, low_open=True)),
        ("ratio(constraint.test/a_act, control.test/a_act) in [2, 4]", "ratio",
         [("constraint", "test/a_act"), ("control", "test/a_act")], Region(2, 4)),
        ("naive.validation/loss < 1", "mean", [("naive", "validation/loss")], Region(high=1, high_open=True)),
        ("rate(control.accuracy >= 0.9) <= .5", "rate", [("control", "test/accuracy")], Region(high=0.5)),
    ],
)  # fmt: skip
def test_claims_are_read(text, function, operands, region):
    claim = read(text)
    assert (claim.function, claim.region) == (function, region)
    assert [(operand.arm, operand.measure) for operand in claim.operands] == operands
    assert claim.condition == (Region(low=0.9) if function == "rate" else None)


@pytest.mark.parametrize(
    ("text", "fault", "sentence"),
    [
        ("", "", "expected an arm, not the end"),
        ("< 3", "< 3", "expected an arm, not <"),
        ("contol.accuracy < 3", "contol", "there is no arm contol; did you mean 'control'?"),
        ("control.acuracy < 3", "acuracy", "the study measures no acuracy; did you mean 'accuracy'?"),
        ("control.a_act < 3", "a_act", "a_act may be test/a_act or heldout/a_act: write it in full"),
        ("control. < 3", "< 3", "expected a measure, not <"),
        ("control", "", "expected <, <=, >, >= or in, not the end"),
        ("control = 3", "= 3", "expected <, <=, >, >= or in, not ="),
        ("control < naive", "naive", "expected a number, not naive"),
        ("control < 3 and", "and", "expected the end of the claim, not and"),
        ("control in 2, 4", "2, 4", "expected '[', not 2"),
        ("control in [2 4]", "4]", "expected ',', not 4"),
        ("control in [4, 2]", "2]", "the interval is empty: 2 is below 4"),
        ("control in [2, 4", "", "expected ']', not the end"),
        ("ration(control, naive) > 1", "ration", "there is no function ration; did you mean 'ratio'?"),
        ("ratio(control naive) > 1", "naive", "expected ',', not naive"),
        ("ratio(control, naive > 1", "> 1", "expected ')', not >"),
        ("rate(control) > 1", ") > 1", "expected <, <=, > or >=, not )"),
        ("difference(control, 3) > 1", "3) > 1", "expected an arm, not 3"),
    ],
)
def test_a_malformed_claim_is_one_firstand_a_caret(text, fault, sentence):
    with pytest.raises(ClaimError) as raised:
        read(text)
    first, shown, caret = str(raised.value).split("\n")
    assert first.startswith("claims.000-01: ")
    assert sentence in first
    assert shown == f"  {text}"
    assert shown[len(caret) - 1 :].startswith(fault)
    assert caret.strip() == "^"
    assert (len(caret) - 1 == len(shown)) == (fault == "")


def series(*values):
    return {seed: Measured(value) for seed, value in enumerate(values)}


def weigh(text, **arms):
    return judge(read(text), {arm: {"test/accuracy": arms.get(arm, {})} for arm in ARMS})


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("control > 0.5", "held"),
        ("control < 0.5", "refuted"),
        ("control > 0.71", "undecided"),
        ("control in [0.6, 0.8]", "held"),
        ("control in [0.7, 0.8]", "undecided"),
        ("control in [0.9, 1]", "refuted"),
        ("control in [0.1, 0.3]", "refuted"),
        ("difference(control, naive) > 0.3", "held"),
        ("difference(naive, control) > 0", "refuted"),
        ("ratio(control, naive) in [1.5, 3]", "held"),
        ("rate(control > 0.6) > 0.3", "held"),
        ("rate(control > 0.7) > 0.5", "undecided"),
    ],
)
def test_verdicts_are_where_the_interval_lies(text, verdict):
    judged = weigh(text, control=series(0.69, 0.71, 0.70, 0.72), naive=series(0.32, 0.34, 0.33, 0.36))
    assert judged.verdict == verdict
    assert (judged.verdict == "undecided") == ("seeds would" in judged.note)


def test_an_interval_that_ends_on_the_bound_knows_open_from_closed():
    for value in (0.5, 0.1, 0.7, 0.95, 0.317, 0.0):
        for seeds in range(2, 12):  # of which some have a sum that is rounded
            arms = {"control": series(*[value] * seeds), "naive": series(*[value / 2] * seeds)}
            found = [weigh(f"control {sign} {value}", **arms).verdict for sign in ("<", "<=", ">", ">=")]
            assert found == ["refuted", "held", "refuted", "held"], (value, seeds)
            assert weigh(f"difference(control, naive) >= {value / 2}", **arms).verdict == "held"
            assert not value or weigh("ratio(control, naive) in [2, 2]", **arms).verdict == "held"


def test_without_runs_nothing_is_decided():
    judged = weigh("difference(control, naive) > 0", control=series(1.0, 2.0))
    assert (judged.verdict, judged.note) == ("undecided", "no finished run of naive has test/accuracy")
    assert math.isnan(judged.estimate.value)


def test_a_seed_that_diverged_is_not_passed_over():
    arms = {"control": series(0.9, math.nan, 0.9), "naive": series(0.1, 0.1, 0.1)}
    for text in ("control > 0.5", "difference(control, naive) > 0", "ratio(naive, control) < 1"):
        judged = weigh(text, **arms)
        assert (judged.verdict, judged.note) == ("undecided", "no value in control, seed 1")
    assert weigh("rate(control > 0.5) > 0.5", **arms).estimate.value == pytest.approx(2 / 3)


def test_one_seed_without_an_interval_decides_nothing():
    judged = weigh("control > 0", control=series(1.0))
    assert judged.verdict == "undecided"
    assert judged.note == "one seed, whose run gives no interval; at least 2 seeds would show the spread"
