"""The examination of a trained bridge: what a result must carry, with its uncertainty.

Shapes: B batch, K soft tokens, D target width, N answer tokens of the whole batch, G candidates a group.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_modules.core.diversity import (
    between_input_variance,
    distinct,
    distinct_n,
    effective_rank,
    mean_pairwise_cosine,
)
from lightning_modules.core.metrics import wilson_interval
from lightning_modules.core.samples import EvalSample, gather_objects, text_table, write_jsonl
from lightning_modules.telepathy.figures import loss_by_position, soft_token_map

GROUP = 8  # candidates of the retrieval measure
RETRIEVED = 64  # answers of a batch that it is taken on, at GROUP passes each
KEPT = 256  # inputs whose soft tokens are kept for the measures of spread
SHIFTS = 8  # derangements that the chance level of entity transfer is averaged over


@dataclass
class Row:
    """What one problem gave."""

    problem: Any
    output: str
    text_output: str
    losses: dict[str, np.ndarray]  # condition -> cross-entropy of each answer token
    soft_tokens: int
    soft: np.ndarray | None = None  # the soft tokens themselves, for the first of them
    candidates: np.ndarray | None = None  # log-likelihood of this answer under each source of its group, its own first


@dataclass
class Examination:
    """Rows of a test set, over all ranks, and what is computed from them.

    Attributes:
        name: The test set's name, and the first part of its metrics' names.
        rows: What was seen on this rank.
        seconds: Time to make soft tokens, source included, and for the target to read the text instead.
    """

    name: str
    rows: list[Row] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"soft": 0.0, "text": 0.0})

    @torch.no_grad()
    def add(self, module: Any, batch: dict[str, Any]) -> None:
        """Examine a batch: answers by soft tokens and by text, and losses under each condition.

        The conditions: `bridge`; `shuffled`, the soft tokens of another question; `text`, the question itself; `none`,
        no question at all.
        """
        target, answers = module.target, batch["answers"]
        soft, text = target.soft_frame, target.text_frame
        with self._timed("soft", module.device):
            soft_BKD = module(batch)
        mask_BK, text_mask_BQ = batch["soft_mask"], batch["text_mask"]
        text_BQD = target.embedding(batch["text"])
        with self._timed("text", module.device):
            target.model.base_model(inputs_embeds=text_BQD, use_cache=False)
        losses = {
            "bridge": target.answer_losses(soft, soft_BKD, mask_BK, answers),
            "shuffled": target.answer_losses(soft, soft_BKD.roll(1, 0), mask_BK.roll(1, 0), answers),
            "text": target.answer_losses(text, text_BQD, text_mask_BQ, answers),
            "none": target.answer_losses(text, text_BQD[:, :0], text_mask_BQ[:, :0], answers),
        }
        outputs = target.answer(soft, soft_BKD, mask_BK, module.max_new_tokens)
        text_outputs = target.answer(text, text_BQD, text_mask_BQ, module.max_new_tokens)
        candidates = self._candidates(target, soft_BKD, mask_BK, answers)
        for i, problem in enumerate(batch["problems"]):
            kept = soft_BKD[i].float().cpu().numpy() if len(self.rows) < KEPT // module.trainer.world_size else None
            per_token = {condition: values[i] for condition, values in losses.items()}
            row = Row(problem, outputs[i], text_outputs[i], per_token, int(mask_BK[i].sum()), kept)
            row.candidates = candidates[i] if i < len(candidates) else None
            self.rows.append(row)

    @staticmethod
    def _candidates(target: Any, soft_BKD: Tensor, mask_BK: Tensor, answers: list[list[int]]) -> np.ndarray:
        """Log-likelihood of answers given each of GROUP sources; column 0 is the answer's own."""
        count = min(len(answers), RETRIEVED) // GROUP * GROUP
        scores = []
        for shift in range(GROUP if count else 0):
            # Row i meets the source `shift` places on, within its group
            own = torch.arange(count, device=soft_BKD.device)
            other = own // GROUP * GROUP + (own + shift) % GROUP
            losses = target.answer_losses(target.soft_frame, soft_BKD[other], mask_BK[other], answers[:count])
            scores.append([-values.sum() for values in losses])
        return np.array(scores).T if scores else np.zeros((0, GROUP))

    def _timed(self, what: str, device: torch.device) -> "_Timed":
        return _Timed(self.seconds, what, device)

    def report(self, module: Any) -> None:
        """Log the measures, figures and samples of all ranks; every rank takes part."""
        rows = [row for part in gather_objects(self.rows) for row in part]
        rows.sort(key=lambda row: row.problem.question)  # the same order, and so derangement, for any number of ranks
        metrics, intervals = measures(rows)
        milliseconds = {f"{what}_ms": 1000 * seconds / len(self.rows) for what, seconds in self.seconds.items()}
        width = module.target.width
        sizes = {
            "soft_bytes": float(np.mean([2 * width * row.soft_tokens for row in rows])),  # as bf16
            "text_bytes": float(np.mean([len(row.problem.question.encode()) for row in rows])),
        }
        for measure, value in {**metrics, **milliseconds, **sizes}.items():
            module.log(f"{self.name}/{measure}", value, rank_zero_only=False)
            module.counts[f"{self.name}/{measure}"] = len(rows)
        module.intervals.update({f"{self.name}/{measure}": interval for measure, interval in intervals.items()})
        folder = module.trainer.log_dir  # a collective: asked for on every rank
        if not module.trainer.is_global_zero or module.trainer.fast_dev_run or folder is None:
            return
        samples = [EvalSample(r.problem.question, r.problem.answer, r.output, _scores(r)) for r in rows]
        write_jsonl(Path(folder, "samples", f"{self.name}.jsonl"), samples)
        figures = {"loss_by_position": loss_by_position(rows)}
        kept = [row for row in rows if row.soft is not None]
        if len(kept) > 2:
            soft_IF = stack_soft([row.soft for row in kept]).reshape(len(kept), -1)
            figures["soft_tokens"] = soft_token_map(soft_IF, [row.problem.template for row in kept])
        for logger in module.trainer.loggers:
            if hasattr(logger.experiment, "add_figure"):
                logger.experiment.add_text(f"{self.name}/samples", text_table(samples[:16]), module.trainer.global_step)
                for name, figure in figures.items():
                    logger.experiment.add_figure(f"{self.name}/{name}", figure, module.trainer.global_step)


class _Timed:
    """Add the time of a block to a total, with the device's work in it done."""

    def __init__(self, totals: dict[str, float], what: str, device: torch.device):
        self.totals, self.what, self.cuda = totals, what, device.type == "cuda"

    def _now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def __enter__(self) -> None:
        self.start = self._now()

    def __exit__(self, *_: Any) -> None:
        self.totals[self.what] += self._now() - self.start


def _scores(row: Row) -> dict[str, float]:
    right, text_right = row.problem.is_correct(row.output), row.problem.is_correct(row.text_output)
    return {"accuracy": float(right), "text_accuracy": float(text_right)}


def bootstrap(count: int, statistic: Callable[[np.ndarray], float], resamples: int = 1000) -> tuple[float, float]:
    """Percentile interval at 95 % of a statistic of indices into `count` samples (Efron 1979), with a fixed seed."""
    generator = np.random.default_rng(0)
    values = [statistic(generator.integers(0, count, count)) for _ in range(resamples)]
    low, high = np.percentile(values, [2.5, 97.5])
    return float(low), float(high)


def measures(rows: list[Row]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Compute every measure of a test set, and the intervals of those that have one."""
    count = len(rows)
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    right = np.array([row.problem.is_correct(row.output) for row in rows])
    text_right = np.array([row.problem.is_correct(row.text_output) for row in rows])
    for name, hits in {"accuracy": right, "text_accuracy": text_right}.items():
        metrics[name], intervals[name] = float(hits.mean()), wilson_interval(int(hits.sum()), count)
    metrics["relative_accuracy"] = float(right.sum() / text_right.sum()) if text_right.any() else math.nan
    outputs = [row.output for row in rows]
    metrics["distinct"], metrics["distinct_2"] = distinct(outputs), distinct_n(outputs, 2)

    loss = {condition: np.array([row.losses[condition].mean() for row in rows]) for condition in rows[0].losses}
    metrics |= {f"ce_{condition}": float(values.mean()) for condition, values in loss.items()}
    gain, whole = loss["none"] - loss["bridge"], loss["none"] - loss["text"]
    specificity = loss["shuffled"] - loss["bridge"]
    metrics["bridge_gain"], metrics["source_specificity"] = float(gain.mean()), float(specificity.mean())
    metrics["recovery"] = float(gain.sum() / whole.sum())
    intervals["bridge_gain"] = bootstrap(count, lambda i: gain[i].mean())
    intervals["source_specificity"] = bootstrap(count, lambda i: specificity[i].mean())
    intervals["recovery"] = bootstrap(count, lambda i: gain[i].sum() / whole[i].sum())

    for part in (entity_transfer(rows), retrieval(rows), twin_consistency(rows, right)):
        metrics |= part[0]
        intervals |= part[1]
    return metrics | spread(rows), intervals


def entity_transfer(rows: list[Row]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """e* = (e - e0) / (1 - e0): the share e of an answer's names, objects and numbers that the output has.

    Whole words; e0, the chance level, is the same share in the outputs to other questions. Over all entities and by
    type.
    """
    generator, count = np.random.default_rng(0), len(rows)
    order = generator.permutation(count)
    metrics: dict[str, float] = {}
    intervals: dict[str, tuple[float, float]] = {}
    if count < 2:
        return metrics, intervals

    def tally(output_of: np.ndarray) -> dict[str, np.ndarray]:
        kinds: dict[str, np.ndarray] = {}
        for i, j in zip(order, output_of, strict=True):
            for kind, found in rows[i].problem.entity_hits(rows[j].output).items():
                if found:
                    kinds.setdefault(kind, np.zeros((count, 2)))[i] = sum(found), len(found)
        return kinds

    own = tally(order)
    others = [tally(np.roll(order, shift)) for shift in range(1, min(SHIFTS, count - 1) + 1)]
    chance = {kind: sum(other[kind] for other in others) / len(others) for kind in own}
    if not own:
        return metrics, intervals
    own["all"], chance["all"] = sum(own.values()), sum(chance.values())
    for kind, hits in own.items():

        def corrected(i: np.ndarray, hits: np.ndarray = hits, other: np.ndarray = chance[kind]) -> float:
            total = max(hits[i, 1].sum(), 1)
            e, e0 = hits[i, 0].sum() / total, other[i, 0].sum() / total
            return (e - e0) / (1 - e0) if e0 < 1 else 0.0

        suffix = "" if kind == "all" else f"_{kind}"
        metrics[f"entity_recall{suffix}"] = float(hits[:, 0].sum() / hits[:, 1].sum())
        metrics[f"entity_chance{suffix}"] = float(chance[kind][:, 0].sum() / hits[:, 1].sum())
        metrics[f"entity_transfer{suffix}"] = float(corrected(np.arange(count)))
        intervals[f"entity_transfer{suffix}"] = bootstrap(count, corrected)
    return metrics, intervals


def retrieval(rows: list[Row]) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Which of GROUP sources explains the answer best, and the bound on mutual information that this gives.

    With f_ij = log p(answer j | soft tokens i): retrieval@1 is the share of answers whose own source has the largest f;
    the bound is ln G + E log softmax_i f (van den Oord et al. 2018), never above ln G. Chance is 1 / G.
    """
    scores = np.array([row.candidates for row in rows if row.candidates is not None])
    if not len(scores):
        return {}, {}
    best = scores.argmax(1) == 0
    top = scores.max(1, keepdims=True)
    log_share = scores[:, 0] - (top[:, 0] + np.log(np.exp(scores - top).sum(1)))
    metrics = {"retrieval": float(best.mean()), "infonce_bound": float(math.log(scores.shape[1]) + log_share.mean())}
    return metrics, {"retrieval": wilson_interval(int(best.sum()), len(best))}


def twin_consistency(rows: list[Row], right: np.ndarray) -> tuple[dict[str, float], dict[str, tuple[float, float]]]:
    """Share of twins, problems that differ in one number, of which both are answered right."""
    pairs: dict[tuple[str, int], list[bool]] = {}
    for row, hit in zip(rows, right, strict=True):
        if row.problem.pair is not None:
            pairs.setdefault((row.problem.template, row.problem.pair), []).append(bool(hit))
    both = [all(hits) for hits in pairs.values() if len(hits) == 2]
    if not both:
        return {}, {}
    return {"twin_consistency": sum(both) / len(both)}, {"twin_consistency": wilson_interval(sum(both), len(both))}


def spread(rows: list[Row]) -> dict[str, float]:
    """How much soft tokens differ from input to input."""
    kept = [row.soft for row in rows if row.soft is not None]
    if len(kept) < 2:
        return {}
    soft_BKD = torch.tensor(stack_soft(kept))
    mask_BK = soft_BKD.abs().sum(-1) > 0
    return {
        "cosine": float(mean_pairwise_cosine(soft_BKD.flatten(1))),
        "between_input_variance": float(between_input_variance(soft_BKD, mask_BK)),
        "effective_rank": float(effective_rank(soft_BKD.flatten(1))),
    }


def stack_soft(kept: list[np.ndarray]) -> np.ndarray:
    """Stack soft tokens of different numbers, zero where there are none: soft_BKD."""
    longest = max(len(soft) for soft in kept)
    return np.stack([np.pad(soft, ((0, longest - len(soft)), (0, 0))) for soft in kept])
