"""The examination of a trained bridge on a test set: passes through the models, and the report of all ranks.

Shapes: B batch, K soft tokens, Q question tokens, D target width, G candidates per group.
"""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
import torch
from lightning import Trainer
from numpy.typing import NDArray
from torch import Tensor

from lightning_modules.core.contracts import HasCounts
from lightning_modules.core.reporting import add_figure, add_text, is_dry_run, run_folder
from lightning_modules.core.samples import EvalSample, gather_objects, text_table, write_jsonl
from lightning_modules.telepathy.batch import EvaluationBatch
from lightning_modules.telepathy.figures import cosine_map, loss_by_position, soft_token_map
from lightning_modules.telepathy.measures import ProblemResult, measure, stack_soft
from lightning_modules.telepathy.target import Target

GROUP = 8  # candidates of the retrieval measure
RETRIEVED = 64  # answers of a batch on which it is measured, with GROUP passes each
KEPT = 256  # inputs whose soft tokens are kept, for the measures of their spread
SHOWN = 16  # samples in the text table


class Examined(HasCounts, Protocol):
    """A module with a bridge and a target, as far as an examination needs it."""

    max_new_tokens: int

    @property
    def target(self) -> Target:
        """The frozen target."""
        ...

    @property
    def device(self) -> torch.device:
        """The device of the module."""
        ...

    @property
    def trainer(self) -> Trainer:
        """The trainer."""
        ...

    def __call__(self, batch: EvaluationBatch) -> Tensor:
        """Return soft_BKD."""
        ...

    def log(self, name: str, value: float) -> None:
        """Log a value."""
        ...


@dataclass
class Examination:
    """The results of a test set on this rank, and the report of all ranks.

    Attributes:
        name: Name of the test set, the first part of its metrics' names.
        results: One result per problem.
        seconds: Total time to make soft tokens, source included (`soft`), and for the target to read the text instead
            (`text`).
    """

    name: str
    results: list[ProblemResult] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: {"soft": 0.0, "text": 0.0})

    @torch.no_grad()
    def add(self, module: Examined, batch: EvaluationBatch) -> None:
        """Answer a batch by soft tokens and by text, and compute the losses of its answers under four conditions.

        - `bridge`: the soft tokens of the question;
        - `shuffled`: the soft tokens of another question;
        - `text`: the text of the question;
        - `none`: no question.
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
        candidates_BG = _candidates(target, soft_BKD, mask_BK, answers)
        most = KEPT // module.trainer.world_size
        for i, problem in enumerate(batch["problems"]):
            by_condition = {condition: per_answer[i] for condition, per_answer in losses.items()}
            result = ProblemResult(problem, outputs[i], text_outputs[i], by_condition, int(mask_BK[i].sum()))
            result.soft_KD = soft_BKD[i].float().cpu().numpy() if len(self.results) < most else None
            result.candidates_G = candidates_BG[i] if i < len(candidates_BG) else None
            self.results.append(result)

    @contextmanager
    def _timed(self, what: str, device: torch.device) -> Iterator[None]:
        """Add the time of a block, with the device's work in it, to `seconds`."""
        start = _now(device)
        yield
        self.seconds[what] += _now(device) - start

    def report(self, module: Examined) -> None:
        """Log the measures of all ranks; write their samples and draw figures. Every rank must call it."""
        parts = gather_objects((self.results, self.seconds))
        results = [result for part, _ in parts for result in part]
        results.sort(key=lambda result: result.problem.question)  # the same derangements for any number of ranks
        count, measures = len(results), measure(results)
        for what in self.seconds:
            seconds = sum(taken[what] for _, taken in parts)
            measures.add(f"{what}_ms", 1000 * seconds / count, count)
        bf16_bytes = 2 * module.target.width
        measures.add("soft_bytes", np.mean([bf16_bytes * result.soft_count for result in results]).item(), count)
        measures.add("text_bytes", np.mean([len(r.problem.question.encode()) for r in results]).item(), count)
        for measured, value in measures.values.items():
            module.log(f"{self.name}/{measured}", value)
        module.counts |= {f"{self.name}/{measured}": number for measured, number in measures.counts.items()}
        module.hits |= {f"{self.name}/{measured}": [hits] for measured, hits in measures.hits.items()}
        module.intervals |= {f"{self.name}/{measured}": interval for measured, interval in measures.intervals.items()}
        self._show(module.trainer, results)

    def _show(self, trainer: Trainer, results: list[ProblemResult]) -> None:
        folder = run_folder(trainer)
        if not trainer.is_global_zero or is_dry_run(trainer):
            return
        samples = [EvalSample(r.problem.question, r.problem.answer, r.output, _scores(r)) for r in results]
        write_jsonl(folder / "samples" / f"{self.name}.jsonl", samples)
        add_text(trainer, f"{self.name}/samples", text_table(samples[:SHOWN]))
        add_figure(trainer, f"{self.name}/loss_by_position", loss_by_position([result.losses for result in results]))
        kept = {i: result.soft_KD for i, result in enumerate(results) if result.soft_KD is not None}
        if len(kept) < 3:
            return
        soft_BF = stack_soft(list(kept.values())).reshape(len(kept), -1)
        if np.isfinite(soft_BF).all():
            templates = [results[i].problem.template for i in kept]
            add_figure(trainer, f"{self.name}/soft_tokens", soft_token_map(soft_BF, templates))
            add_figure(trainer, f"{self.name}/soft_token_cosines", cosine_map(soft_BF, templates))


def _candidates(target: Target, soft_BKD: Tensor, mask_BK: Tensor, answers: list[list[int]]) -> NDArray[np.floating]:
    """Return scores_BG, the log-likelihood of answers given the soft tokens of each problem of their group of GROUP.

    Column 0 belongs to the answer's own problem. B is at most RETRIEVED here, and a multiple of GROUP.
    """
    count = min(len(answers), RETRIEVED) // GROUP * GROUP
    row_B = torch.arange(count, device=soft_BKD.device)
    scores = []
    for shift in range(GROUP if count else 0):
        other_B = row_B // GROUP * GROUP + (row_B + shift) % GROUP  # `shift` places further within the group
        losses = target.answer_losses(target.soft_frame, soft_BKD[other_B], mask_BK[other_B], answers[:count])
        scores.append([-values.sum() for values in losses])
    return np.array(scores).T if scores else np.zeros((0, GROUP))


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()  # until the work that was launched is done
    return time.perf_counter()


def _scores(result: ProblemResult) -> dict[str, float]:
    right, text_right = (result.problem.is_correct(text) for text in (result.output, result.text_output))
    return {"accuracy": float(right), "text_accuracy": float(text_right)}
