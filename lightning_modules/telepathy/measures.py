"""The measures of a trained bridge: from the results of single problems to values, with intervals, hits and samples.

Shapes: B problems, K soft tokens, D target width, G candidates per group.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from datamodules.problem_parts import CATEGORY_OF
from datamodules.problems import Problem
from lightning_modules.core.diversity import (
    between_input_variance,
    distinct,
    distinct_n,
    effective_rank,
    mean_pairwise_cosine,
)
from lightning_modules.telepathy.code_use import perplexity
from lightning_modules.telepathy.draw import Draw
from lightning_modules.telepathy.entity_transfer import add_category_transfer, add_entity_transfer
from lightning_modules.telepathy.results import CONDITIONS, Array, Measures, ProblemResult, bootstrap

TIE = 1e-3  # nats: candidates closer than this are equal, for rounding depends on the rows beside
NEAR_ZERO = 0.05  # share of the problems, and of ce_none
# Measures that do not depend on the bridge, and those that depend on the learned prefix
FROM_PREFIX = ("text_prefix_accuracy", "text_prefix_truncated", "ce_text_prefix")
FROM_TARGET = ("text_accuracy", "text_truncated", "zero_accuracy", "ce_text", "ce_none", "ce_zero", *FROM_PREFIX)


def measure(results: list[ProblemResult]) -> Measures:
    """Compute every measure of a test set.

    - `accuracy`: share of right answers from soft tokens. `text_accuracy`, `text_prefix_accuracy`, `shuffled_accuracy`
      and `zero_accuracy`: the same under the other conditions of `ProblemResult`. The last two are controls: answers
      that are right without the question's own soft tokens are guesses.
    - `relative_accuracy`: accuracy / text_prefix_accuracy, or accuracy / text_accuracy without a prefix.
    - `truncated`, `text_truncated`, `text_prefix_truncated`: share of answers that the length limit has cut.
    - `distinct`, `distinct_2`: share of different answers, and of different pairs of words.
    - `ce_<condition>`: mean over answers of the mean cross-entropy per token, in nats.
    - `bridge_gain`: ce_none - ce_bridge; `source_specificity`: ce_shuffled - ce_bridge; `recovery`: bridge_gain /
      (ce_none - ce_text).
    - `code_perplexity`: exp of the entropy of the codes of all soft tokens, with a bottleneck.
    - The measures that `add_entity_transfer`, `add_category_transfer`, `add_retrieval`, `add_twin_consistency` and
      `add_spread` add.

    A ratio to a number near 0 says nothing, and is absent. `relative_accuracy` is absent where the 95 % interval of its
    denominator reaches below 5 % of the problems. `recovery` is absent where that of ce_none - ce_text reaches below
    5 % of ce_none: the text then hardly helps the target. Measures that compare problems are absent where all
    questions are equal.

    A bridge that gives losses that are not finite has diverged: its measures are NaN, while the target still gives
    answers. The same holds for a prefix.

    Args:
        results: The results of all problems, sorted.
    """
    measures, count = Measures(), len(results)
    right: dict[str, NDArray[np.bool_]] = {}
    for condition in CONDITIONS:
        if condition not in results[0].answers:
            continue
        answers = [result.answers[condition] for result in results]
        right[condition] = np.array([r.problem.is_correct(a.text) for r, a in zip(results, answers, strict=True)])
        prefix = "" if condition == "bridge" else f"{condition}_"
        measures.add_proportion(f"{prefix}accuracy", right[condition])
        if condition in ("bridge", "text", "text_prefix"):
            measures.add_proportion(f"{prefix}truncated", [answer.is_cut for answer in answers])
    reference = "text_prefix" if "text_prefix" in right else "text"
    if measures.intervals[f"{reference}_accuracy"][0] >= NEAR_ZERO:
        measures.add("relative_accuracy", right["bridge"].sum() / right[reference].sum(), count)
    outputs = [result.answers["bridge"].text for result in results]
    measures.add("distinct", distinct(outputs), count)
    measures.add("distinct_2", distinct_n(outputs, 2), count)
    has_diverged = _add_losses(results, measures)

    draw = Draw([result.problem for result in results])
    add_entity_transfer(results, draw, measures)
    add_category_transfer(results, draw, measures)
    add_retrieval(results, measures)
    add_twin_consistency(results, right["bridge"], measures)
    add_spread(results, measures)
    codes = [result.codes_K for result in results if result.codes_K is not None]
    if codes:
        counts_V = np.unique(np.concatenate(codes), return_counts=True)[1]
        measures.add("code_perplexity", perplexity(torch.from_numpy(counts_V)).item(), count)
    void: set[str] = set()
    if has_diverged["bridge"]:
        void |= measures.values.keys() - set(FROM_TARGET)
    if has_diverged.get("text_prefix"):
        void |= {*FROM_PREFIX, "relative_accuracy"} & measures.values.keys()
    for name in void:
        measures.void(name)
    return measures


def _add_losses(results: list[ProblemResult], measures: Measures) -> dict[str, bool]:
    """Add what is made of losses; return for each condition whether a loss is not finite."""
    count = len(results)
    loss: dict[str, Array] = {}
    for condition in CONDITIONS:
        if condition in results[0].losses:
            loss[condition] = np.array([result.losses[condition].mean() for result in results], dtype=np.float64)
            measures.add(f"ce_{condition}", loss[condition].mean(), count)
    gain_B, whole_B = loss["none"] - loss["bridge"], loss["none"] - loss["text"]
    measures.add("bridge_gain", gain_B.mean(), count, bootstrap(count, lambda i: gain_B[i].mean()))
    if "shuffled" in loss:
        specificity_B = loss["shuffled"] - loss["bridge"]
        interval = bootstrap(count, lambda i: specificity_B[i].mean())
        measures.add("source_specificity", specificity_B.mean(), count, interval)
    if bootstrap(count, lambda i: whole_B[i].mean())[0] >= NEAR_ZERO * loss["none"].mean():
        interval = bootstrap(count, lambda i: gain_B[i].sum() / whole_B[i].sum())
        measures.add("recovery", gain_B.sum() / whole_B.sum(), count, interval)
    return {condition: not np.isfinite(loss_B).all() for condition, loss_B in loss.items()}


def scores(problem: Problem, output: str) -> dict[str, float]:
    """Return the accuracy of one answer, and for each type of entities the share that the answer has.

    If the answer has a wrong object, `category_share` is 1 for an object of the right one's category, else 0.
    """
    found = {kind: hits for kind, hits in problem.entity_hits(output).items() if hits}
    shares = {f"entity_{kind}": sum(hits) / len(hits) for kind, hits in found.items()}
    if word := problem.wrong_object(output):
        shares["category_share"] = float(CATEGORY_OF[word] == problem.category)
    return {"accuracy": float(problem.is_correct(output)), **shares}


def add_retrieval(results: list[ProblemResult], measures: Measures) -> None:
    """Add how well an answer tells its source from the G - 1 others of a group, and a bound on mutual information.

    With f_ij = log p(answer j | soft tokens i), `retrieval` is the share of answers whose own source has the largest f.
    Among equal candidates, the first of the group counts as the largest, so a bridge that gives the same soft tokens to
    every question has 1 / G, which is chance. `infonce_bound` is ln G + E log softmax_i f in nats, at most ln G (van
    den Oord et al. 2018).
    """
    grouped = [(result.candidates_G, result.own) for result in results if result.candidates_G is not None]
    if not grouped:
        return
    scores_BG, own_B = np.array([scores_G for scores_G, _ in grouped]), np.array([own for _, own in grouped])
    top_B1 = scores_BG.max(1, keepdims=True)
    measures.add_proportion("retrieval", (scores_BG >= top_B1 - TIE).argmax(1) == own_B)
    own_score_B = scores_BG[np.arange(len(own_B)), own_B]
    log_share_B = own_score_B - (top_B1[:, 0] + np.log(np.exp(scores_BG - top_B1).sum(1)))
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
    mask_BK = torch.arange(soft_BKD.shape[1]) < torch.tensor([len(soft_KD) for soft_KD in kept])[:, None]
    measures.add("cosine", mean_pairwise_cosine(soft_BKD.flatten(1)).item(), len(kept))
    measures.add("between_input_variance", between_input_variance(soft_BKD, mask_BK).item(), len(kept))
    measures.add("effective_rank", effective_rank(soft_BKD.flatten(1)).item() if finite else math.nan, len(kept))


def stack_soft(kept: Sequence[Array]) -> Array:
    """Stack arrays soft_KD with different K into soft_BKD, zero after the end of the shorter ones."""
    longest = max(len(soft_KD) for soft_KD in kept)
    return np.stack([np.pad(soft_KD, ((0, longest - len(soft_KD)), (0, 0))) for soft_KD in kept])
