"""The verdict on a claim."""

import math
from dataclasses import dataclass
from typing import Literal

from studies.engine.claims import Claim
from studies.engine.statistics import Estimate, Values, difference, mean, rate, ratio, seeds_to_decide

Verdict = Literal["held", "refuted", "undecided"]
OF_TWO = {"difference": difference, "ratio": ratio}


@dataclass(frozen=True)
class Judgement:
    """The verdict on a claim.

    Attributes:
        verdict: `held`, `refuted` or `undecided`.
        estimate: The claim's value with its interval.
        note: Why the claim is undecided, and what the interval covers if that is not the seeds.
    """

    verdict: Verdict
    estimate: Estimate
    note: str


def judge(claim: Claim, values: Values) -> Judgement:
    """Judge a claim: held if the 95 % interval lies inside its region, refuted if outside, else undecided.

    A run that diverged leaves the claim undecided. So does a member of an ensemble without a finite value, but a `rate`
    counts it as a seed that does not satisfy its condition.

    Args:
        claim: The claim.
        values: Arm -> measure -> seed -> value.
    """
    series = [values[operand.arm][operand.measure] for operand in claim.operands]
    missing = [operand for operand, seeds in zip(claim.operands, series, strict=True) if not seeds]
    if missing:
        notes = [f"no finished run of {operand.arm} has {operand.measure}" for operand in missing]
        return _undecided("; ".join(dict.fromkeys(notes)))
    absent = {
        f"{operand.arm}, seed {seed}": measured.diverged
        for operand, seeds in zip(claim.operands, series, strict=True)
        for seed, measured in seeds.items()
        if math.isnan(measured.value)
    }
    if diverged := [run for run, has_diverged in absent.items() if has_diverged]:
        return _undecided(f"diverged: {'; '.join(diverged)}")
    if claim.condition is not None:
        estimate = rate(series[0], claim.condition.__contains__)
    elif absent:
        return _undecided(f"no value in {'; '.join(absent)}")
    else:
        estimate = OF_TWO[claim.function](series[0], series[1]) if claim.function in OF_TWO else mean(series[0])
    if claim.region.holds(estimate.low, estimate.high):
        return Judgement("held", estimate, estimate.note)
    if claim.region.misses(estimate.low, estimate.high):
        return Judgement("refuted", estimate, estimate.note)
    needed = seeds_to_decide(estimate, claim.region.decides)
    return Judgement("undecided", estimate, "; ".join(note for note in (estimate.note, needed) if note))


def _undecided(note: str) -> Judgement:
    return Judgement("undecided", Estimate(math.nan), note)
