"""The examination of a trained bridge on a test set: passes through the models, and the report of all ranks.

Shapes: B batch, K soft tokens, D target width.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from lightning import Trainer

from lightning_modules.core.reporting import add_figure, add_text, is_dry_run, run_folder
from lightning_modules.core.samples import EvalSample, gather_objects, text_table, write_jsonl
from lightning_modules.telepathy.batch import EvaluationBatch
from lightning_modules.telepathy.contracts import Examined
from lightning_modules.telepathy.controls import add_controls
from lightning_modules.telepathy.figures import cosine_map, loss_by_position, soft_token_map
from lightning_modules.telepathy.measures import measure, stack_soft
from lightning_modules.telepathy.message import add_message_sizes
from lightning_modules.telepathy.results import ProblemResult

T = TypeVar("T")

SHOWN = 16  # samples in the text table


@dataclass
class Examination:
    """The results of a test set on this rank, and the report of all ranks.

    Attributes:
        name: Name of the test set, the first part of its metrics' names.
        results: One result per problem.
        seconds: Total time to make soft tokens, source included (`soft`), and for the target to read the text instead
            (`text`).
        size: Size of the largest batch.
        width: Numbers of a soft token.
    """

    name: str
    results: list[ProblemResult] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"soft": 0.0, "text": 0.0})
    size: int = 1
    width: int = 0

    @torch.no_grad()
    def add(self, module: Examined, batch: EvaluationBatch) -> None:
        """Compute answers and losses of a batch, under the conditions that do not need other problems."""
        target, limit, prefix = module.target, module.answer_limit, module.text_prefix
        rows, text_rows, mask_BK = batch["soft_rows"], batch["text_rows"], batch["soft_mask"]
        self.size = max(self.size, len(rows))
        with self._timed("soft", module.device):
            encoding = module.encode(batch)
        soft_BKD, codes = encoding.soft_BKD, encoding.codes
        self.width = soft_BKD.shape[-1]
        with self._timed("text", module.device):
            target.losses([replace(row, answer=row.answer[:1]) for row in text_rows])
        losses = {
            "bridge": target.losses(rows, soft_BKD, mask_BK),
            # Not soft tokens times 0, which of a bridge that diverged would be NaN
            "zero": target.losses(rows, torch.zeros_like(soft_BKD), mask_BK),
            "text": target.losses(text_rows),
            "none": target.losses(rows),
        }
        answers = {
            "bridge": target.answers(rows, limit, soft_BKD, mask_BK),
            "text": target.answers(text_rows, limit),
        }
        if prefix is not None:
            prefix_BKD = prefix.vectors(len(rows))
            real_BK = torch.ones(prefix_BKD.shape[:2], dtype=torch.bool)
            losses["text_prefix"] = target.losses(text_rows, prefix_BKD, real_BK)
            answers["text_prefix"] = target.answers(text_rows, limit, prefix_BKD, real_BK)
        for i, (problem, soft_count) in enumerate(zip(batch["problems"], mask_BK.sum(1).tolist(), strict=True)):
            by_condition = {condition: values[i] for condition, values in answers.items()}
            losses_of = {condition: values[i] for condition, values in losses.items()}
            codes_K = None if codes is None else codes.index_BK[i][mask_BK[i]].cpu().numpy()
            self.results.append(ProblemResult(problem, rows[i], soft_count, by_condition, losses_of, codes_K))

    @contextmanager
    def _timed(self, what: str, device: torch.device) -> Iterator[None]:
        """Add the time of a block, with the device's work in it, to `seconds`."""
        start = _now(device)
        yield
        self.seconds[what] += _now(device) - start

    def report(self, module: Examined) -> None:
        """Compute and log the measures of all ranks; write samples and draw figures. Every rank must call it."""
        parts = gather_objects((self.results, self.seconds, self.size, self.width))
        results = [result for part, *_ in parts for result in part]
        # From here on nothing depends on which rank had a problem, and in which batch
        results.sort(key=lambda result: (result.problem.question, result.problem.answer))
        add_controls(module, results, max(size for _, _, size, _ in parts), self.name)
        count, measures = len(results), measure(results)
        for what in self.seconds:
            seconds = sum(taken[what] for _, taken, *_ in parts)
            measures.add(f"{what}_ms", 1000 * seconds / count, count)
        add_message_sizes(results, max(width for *_, width in parts), module.bottleneck.size, measures)
        for measured, value in measures.values.items():
            module.log(f"{self.name}/{measured}", value)
        _replace(module.counts, self.name, measures.counts)
        _replace(module.hits, self.name, {measured: [hits] for measured, hits in measures.hits.items()})
        _replace(module.intervals, self.name, measures.intervals)
        self._show(module.trainer, results)

    def _show(self, trainer: Trainer, results: list[ProblemResult]) -> None:
        folder = run_folder(trainer)
        if not trainer.is_global_zero or is_dry_run(trainer):
            return
        samples = [_sample(result) for result in results]
        write_jsonl(folder / "samples" / f"{self.name}.jsonl", samples)
        add_text(trainer, f"{self.name}/samples", text_table(samples[:SHOWN]))
        add_figure(trainer, f"{self.name}/loss_by_position", loss_by_position([result.losses for result in results]))
        kept = {i: result.soft_KD for i, result in enumerate(results) if result.soft_KD is not None}
        if len(kept) < 3:
            return
        soft_BF = stack_soft(list(kept.values())).reshape(len(kept), -1)
        templates = [results[i].problem.template for i in kept]
        add_figure(trainer, f"{self.name}/soft_tokens", soft_token_map(soft_BF, templates))
        add_figure(trainer, f"{self.name}/soft_token_cosines", cosine_map(soft_BF, templates))


def _replace(recorded: dict[str, T], name: str, of_measures: dict[str, T]) -> None:
    """Replace what is recorded of a test set, which may have had other measures in an earlier test."""
    for measured in [measured for measured in recorded if measured.startswith(f"{name}/")]:
        del recorded[measured]
    recorded.update({f"{name}/{measured}": value for measured, value in of_measures.items()})


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()  # until the work that was launched is done
    return time.perf_counter()


def _sample(result: ProblemResult) -> EvalSample:
    problem, output = result.problem, result.answers["bridge"].text
    text_right = problem.is_correct(result.answers["text"].text)
    scores = {"accuracy": float(problem.is_correct(output)), "text_accuracy": float(text_right)}
    return EvalSample(problem.question, problem.answer, output, scores)
