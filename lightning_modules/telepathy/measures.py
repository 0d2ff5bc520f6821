"""The measures of a trained bridge: from records of single problems to values, with intervals, hits and samples.

Shapes: B problems, K soft tokens, D target width, G candidates per group.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.problems import Problem
from lightning_modules.core.diversity import (
    between_input_variance,
    distinct,
    distinct_n,
    effective_rank,
    mean_pairwise_cosine,
)
from lightning_modules.core.intervals import wilson_interval

SHIFTS = 8  # derangements over which the chance level of entity transfer is averaged
FROM_TEXT = ("text_accuracy", "ce_text", "ce_none")  # measures of the target alone, whatever the bridge does

Array = NDArray[np.floating]
Indices = NDArray[np.integer]


@dataclass
class ProblemResult:
    """The results of one problem.

    Attributes:
        problem: The problem.
        output: The answer from soft tokens.
        text_output: The answer from the text of the question.
        losses: Condition -> cross-entropy of each answer token, in nats (see `Examination`).
        soft_count: Number of soft tokens.
        soft_KD: The soft tokens, kept for some problems only.
        candidates_G: Log-likelihood of the answer given the soft tokens of each problem of a group, its own problem
            first. None for problems outside of full groups.
    """

    problem: Problem
    output: str
    text_output: str
    losses: dict[str, Array]
    soft_count: int
    soft_KD: Array | None = None
    candidates_G: Array | None = None


@dataclass
class Measures:
    """Measures by name.

    Attributes:
        values: The values.
        counts: Samples behind each value.
        hits: Of a proportion, how many of its samples are hits.
        intervals: 95 % intervals, (low, high): Wilson's for proportions, else bootstrap.
    """

    values: dict[str, float] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    hits: dict[str, int] = field(default_factory=dict)
    intervals: dict[str, tuple[float, float]] = field(default_factory=dict)

    def add(self, name: str, value: float, count: int, interval: tuple[float, float] | None = None) -> None:
        """Add one measure."""
        self.values[name], self.counts[name] = float(value), count
        if interval is not None:
            self.intervals[name] = interval

    def add_proportion(self, name: str, hits: Sequence[bool] | NDArray[np.bool_]) -> None:
        """Add the share of hits, with the number of hits and the Wilson interval."""
        total, count = int(sum(hits)), len(hits)
        self.add(name, total / count, count, wilson_interval(total, count))
        self.hits[name] = total

    def void(self, name: str) -> None:
        """Replace a value by NaN, without hits and interval."""
        self.values[name] = math.nan
        self.hits.pop(name, None)
        self.intervals.pop(name, None)


def measure(results: list[ProblemResult]) -> Measures:
    """Compute every measure of a test set.

    - `accuracy`, `text_accuracy`: share of right answers from soft tokens and from the text; `relative_accuracy`: their
      ratio.
    - `distinct`, `distinct_2`: share of different answers, and of different pairs of words.
    - `ce_<condition>`: mean over answers of the mean cross-entropy per token, in nats.
    - `bridge_gain`: ce_none - ce_bridge; `source_specificity`: ce_shuffled - ce_bridge; `recovery`: bridge_gain /
      (ce_none - ce_text).
    - The measures that `add_entity_transfer`, `add_retrieval`, `add_twin_consistency` and `add_spread` add.

    A bridge that gives losses that are not finite has diverged: its measures are NaN, while the target still gives
    answers.
    """
    measures, count = Measures(), len(results)
    right = np.array([result.problem.is_correct(result.output) for result in results])
    text_right = np.array([result.problem.is_correct(result.text_output) for result in results])
    measures.add_proportion("accuracy", right)
    measures.add_proportion("text_accuracy", text_right)
    measures.add("relative_accuracy", right.sum() / text_right.sum() if text_right.any() else math.nan, count)
    outputs = [result.output for result in results]
    measures.add("distinct", distinct(outputs), count)
    measures.add("distinct_2", distinct_n(outputs, 2), count)

    conditions = results[0].losses
    loss = {condition: np.array([result.losses[condition].mean() for result in results]) for condition in conditions}
    for condition, loss_B in loss.items():
        measures.add(f"ce_{condition}", loss_B.mean(), count)
    gain_B, whole_B = loss["none"] - loss["bridge"], loss["none"] - loss["text"]
    specificity_B = loss["shuffled"] - loss["bridge"]
    measures.add("bridge_gain", gain_B.mean(), count, bootstrap(count, lambda i: gain_B[i].mean()))
    interval = bootstrap(count, lambda i: specificity_B[i].mean())
    measures.add("source_specificity", specificity_B.mean(), count, interval)
    interval = bootstrap(count, lambda i: gain_B[i].sum() / whole_B[i].sum())
    measures.add("recovery", gain_B.sum() / whole_B.sum(), count, interval)

    add_entity_transfer(results, measures)
    add_retrieval(results, measures)
    add_twin_consistency(results, right, measures)
    add_spread(results, measures)
    if not np.isfinite(loss["bridge"]).all():
        for name in measures.values.keys() - set(FROM_TEXT):
            measures.void(name)
    return measures


def scores(problem: Problem, output: str) -> dict[str, float]:
    """Return the accuracy of one answer, and for each type of entities the share that the answer has."""
    found = {kind: hits for kind, hits in problem.entity_hits(output).items() if hits}
    shares = {f"entity_{kind}": sum(hits) / len(hits) for kind, hits in found.items()}
    return {"accuracy": float(problem.is_correct(output)), **shares}


def bootstrap(count: int, statistic: Callable[[Indices], float], resamples: int = 1000) -> tuple[float, float]:
    """Return the percentile interval at 95 % of a statistic of `count` samples (Efron 1979), with a fixed seed.

    Args:
        count: Number of samples.
        statistic: Its value for an array of indices of samples.
        resamples: Number of resamples.
    """
    generator = np.random.default_rng(0)
    values = [statistic(generator.integers(0, count, count)) for _ in range(resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def add_entity_transfer(results: list[ProblemResult], measures: Measures) -> None:
    """Add e* = (e - e0) / (1 - e0), where e is the share of an answer's names, objects and numbers that the output has.

    An entity counts if the output has it as a whole word. e0 is the chance level: the same share in the outputs for
    other questions. The measures are `entity_recall` (e), `entity_chance` (e0) and `entity_transfer` (e*), over all
    entities and, with a suffix, for each type.
    """
    count = len(results)
    if count < 2:
        return
    order = np.random.default_rng(0).permutation(count)

    def tally(output_of: Indices) -> dict[str, Array]:
        """Return type -> (entities found, entities) of each problem, in the output of another problem."""
        tallies: dict[str, Array] = {}
        for i, j in zip(order, output_of, strict=True):
            for kind, found in results[i].problem.entity_hits(results[j].output).items():
                if found:
                    tallies.setdefault(kind, np.zeros((count, 2)))[i] = sum(found), len(found)
        return tallies

    recalled = tally(order)
    others = [tally(np.roll(order, shift)) for shift in range(1, min(SHIFTS, count - 1) + 1)]
    chance = {kind: np.sum([other[kind] for other in others], axis=0) / len(others) for kind in recalled}
    if not recalled:
        return
    recalled["all"], chance["all"] = (np.sum(list(table.values()), axis=0) for table in (recalled, chance))
    for kind, found_B2 in recalled.items():
        suffix = "" if kind == "all" else f"_{kind}"
        entities, answers = found_B2[:, 1].sum(), int((found_B2[:, 1] > 0).sum())
        e_star = partial(_chance_corrected, found_B2, chance[kind])
        measures.add(f"entity_recall{suffix}", found_B2[:, 0].sum() / entities, answers)
        measures.add(f"entity_chance{suffix}", chance[kind][:, 0].sum() / entities, answers)
        measures.add(f"entity_transfer{suffix}", e_star(np.arange(count)), answers, bootstrap(count, e_star))


def _chance_corrected(found_B2: Array, chance_B2: Array, indices: Indices) -> float:
    total = max(found_B2[indices, 1].sum(), 1)
    e, e0 = found_B2[indices, 0].sum() / total, chance_B2[indices, 0].sum() / total
    return float((e - e0) / (1 - e0)) if e0 < 1 else 0.0


def add_retrieval(results: list[ProblemResult], measures: Measures) -> None:
    """Add how well an answer tells its source from the G - 1 others of a group, and a bound on mutual information.

    With f_ij = log p(answer j | soft tokens i), `retrieval` is the share of answers whose own source has the largest f.
    Chance is 1 / G. `infonce_bound` is ln G + E log softmax_i f in nats, at most ln G (van den Oord et al. 2018).
    """
    scores_BG = np.array([result.candidates_G for result in results if result.candidates_G is not None])
    if not len(scores_BG):
        return
    measures.add_proportion("retrieval", scores_BG.argmax(1) == 0)
    top_B1 = scores_BG.max(1, keepdims=True)
    log_share_B = scores_BG[:, 0] - (top_B1[:, 0] + np.log(np.exp(scores_BG - top_B1).sum(1)))
    measures.add("infonce_bound", math.log(scores_BG.shape[1]) + log_share_B.mean(), len(scores_BG))


def add_twin_consistency(results: list[ProblemResult], right: NDArray[np.bool_], measures: Measures) -> None:
    """Add `twin_consistency`: the share of pairs, problems that differ in one number, with both answers right."""
    pairs: dict[tuple[str, int], list[bool]] = {}
    for result, hit in zip(results, right, strict=True):
        if result.problem.pair is not None:
            pairs.setdefault((result.problem.template, result.problem.pair), []).append(bool(hit))
    both = [all(hits) for hits in pairs.values() if len(hits) == 2]
    if both:
        measures.add_proportion("twin_consistency", both)


def add_spread(results: list[ProblemResult], measures: Measures) -> None:
    """Add how much soft tokens differ between inputs: `cosine`, `between_input_variance` and `effective_rank`.

    See `lightning_modules.core.diversity` for the formulas.
    """
    kept = [result.soft_KD for result in results if result.soft_KD is not None]
    if len(kept) < 2:
        return
    soft_BKD = torch.tensor(stack_soft(kept))
    finite = bool(soft_BKD.isfinite().all())  # of other values there is no effective rank
    mask_BK = soft_BKD.abs().sum(-1) > 0
    measures.add("cosine", mean_pairwise_cosine(soft_BKD.flatten(1)).item(), len(kept))
    measures.add("between_input_variance", between_input_variance(soft_BKD, mask_BK).item(), len(kept))
    measures.add("effective_rank", effective_rank(soft_BKD.flatten(1)).item() if finite else math.nan, len(kept))


def stack_soft(kept: Sequence[Array]) -> Array:
    """Stack arrays soft_KD with different K into soft_BKD, zero after the end of the shorter ones."""
    longest = max(len(soft_KD) for soft_KD in kept)
    return np.stack([np.pad(soft_KD, ((0, longest - len(soft_KD)), (0, 0))) for soft_KD in kept])
