"""The second part of an examination: what needs the soft tokens of other problems, or the whole test set.

Shapes: B rows, K soft tokens, D target width, G candidates per group.
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import numpy as np
import torch
from lightning import Trainer
from lightning.pytorch.callbacks import TQDMProgressBar
from torch import Tensor
from tqdm import tqdm

from datamodules.problems import Problem
from lightning_modules.core.samples import gather_objects
from lightning_modules.pretrained.answers import Answer
from lightning_modules.telepathy.batch import EvaluationBatch
from lightning_modules.telepathy.contracts import Examined
from lightning_modules.telepathy.draw import DRAWN, Draw
from lightning_modules.telepathy.results import Array, ProblemResult

T = TypeVar("T")


@dataclass
class Crossed:
    """What one rank computes.

    Attributes:
        losses: (i, j) -> cross-entropy of each token of the answer of problem j, given the soft tokens of problem i.
        soft: Problem -> soft_KD, for the first problems of the draw.
        zeros: Number of zero vectors -> the answer to them.
    """

    losses: dict[tuple[int, int], Array] = field(default_factory=dict)
    soft: dict[int, Array] = field(default_factory=dict)
    zeros: dict[int, Answer] = field(default_factory=dict)


@torch.no_grad()
def add_controls(module: Examined, results: list[ProblemResult], size: int, name: str) -> None:
    """Add to the results of a whole test set what does not belong to single problems.

    The additions are losses and answers under `shuffled`, answers under `zero`, the candidates of the retrieval
    measure, and the soft tokens of some problems. They are drawn over the whole set (`Draw`), so they depend neither on
    the batches of the test nor on the number of ranks. Without a second question, only the answers under `zero` are
    added.

    Every rank must call it with the same results in the same order. Each computes an even part of the work, or none if
    there is not enough for all.

    Args:
        module: The module.
        results: The results of all ranks.
        size: Rows per batch.
        name: Name of the test set, for the progress bar.
    """
    draw, trainer = Draw([result.problem for result in results]), module.trainer
    rank, world = trainer.global_rank, trainer.world_size
    pairs, counts = _pairs(draw), sorted({result.soft_count for result in results})
    # Every world-th, for the first problems of the cycle have several pairs and the others one
    givers, mine = list(pairs)[rank::world], Crossed()
    # Lightning enters this context for its steps only; without it, autocast would not apply here
    with (
        trainer.precision_plugin.test_step_context(),
        _bar(trainer, name, sum(len(pairs[giver]) for giver in givers)) as bar,
    ):
        for some in _batches(givers, size):
            soft_BKD, mask_BK = _soft_tokens(module, [results[giver].problem for giver in some])
            for row, giver in enumerate(some):
                if draw.place_B[giver] < DRAWN:
                    mine.soft[giver] = soft_BKD[row][mask_BK[row]].float().cpu().numpy()
            theirs = [(row, taker) for row, giver in enumerate(some) for taker in pairs[giver]]
            theirs.sort(key=lambda pair: len(results[pair[1]].row.answer))  # less padding
            for few in _batches(theirs, size):
                row_B = torch.tensor([row for row, _ in few], device=soft_BKD.device)
                rows = [results[taker].row for _, taker in few]
                losses = module.target.losses(rows, soft_BKD[row_B], mask_BK[row_B])
                mine.losses |= {(some[row], taker): loss for (row, taker), loss in zip(few, losses, strict=True)}
                bar.update(len(few))
        for numbers in _batches(counts[rank::world], size):
            mine.zeros |= _answers_to_zeros(module, results, numbers)
    parts, whole = gather_objects(mine), Crossed()
    for part in parts:
        whole.losses |= part.losses
        whole.soft |= part.soft
        whole.zeros |= part.zeros
    _fill_in(results, draw, whole)


def _pairs(draw: Draw) -> dict[int, list[int]]:
    """Return for each problem of the cycle, in its order, the problems whose answers are given its soft tokens."""
    takers: dict[int, set[int]] = {giver: set() for giver in draw.order_Q.tolist()}
    if len(takers) < 2:
        return {}
    for taker, giver in enumerate(draw.others_B(1).tolist()):
        takers[giver].add(taker)
    for group in draw.groups_NG().tolist():
        for giver in group:
            takers[giver] |= set(group) - {giver}
    return {giver: sorted(taken) for giver, taken in takers.items()}


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def _soft_tokens(module: Examined, problems: Sequence[Problem]) -> tuple[Tensor, Tensor]:
    """Return soft_BKD and soft_mask_BK of problems."""
    collated = module.collate(problems, training=False)
    batch = cast(EvaluationBatch, module.trainer.strategy.batch_to_device(collated))
    return module(batch), batch["soft_mask"]


def _answers_to_zeros(module: Examined, results: list[ProblemResult], counts: Sequence[int]) -> dict[int, Answer]:
    """Answer each number of zero vectors. The question is not in the row, so the answer depends on the number alone."""
    row_of = {result.soft_count: result.row for result in results}
    count_B = torch.tensor(counts, device=module.device)
    mask_BK = torch.arange(max(counts), device=module.device) < count_B[:, None]
    zeros_BKD = torch.zeros(*mask_BK.shape, module.target.width, device=module.device)
    answers = module.target.answers([row_of[count] for count in counts], module.answer_limit, zeros_BKD, mask_BK)
    return dict(zip(counts, answers, strict=True))


def _fill_in(results: list[ProblemResult], draw: Draw, whole: Crossed) -> None:
    for result in results:
        result.answers["zero"] = whole.zeros[result.soft_count]
    for i, soft_KD in whole.soft.items():
        results[i].soft_KD = soft_KD
    if len(draw.order_Q) < 2:
        return
    for i, other in enumerate(draw.others_B(1).tolist()):
        results[i].losses["shuffled"] = whole.losses[other, i]
        # The row has no question: the answer to the other's soft tokens is the one that the other problem got
        results[i].answers["shuffled"] = results[other].answers["bridge"]
    for group in draw.groups_NG().tolist():
        for own, j in enumerate(group):
            losses = [results[j].losses["bridge"] if i == j else whole.losses[i, j] for i in group]
            results[j].candidates_G, results[j].own = np.array([-loss.sum() for loss in losses]), own


def _bar(trainer: Trainer, name: str, total: int) -> "tqdm[Any]":
    """Return a progress bar, shown where the trainer shows one of the same kind."""
    other = trainer.progress_bar_callback
    return tqdm(
        total=total,
        desc=f"Controls of {name}",
        disable=not (trainer.is_global_zero and isinstance(other, TQDMProgressBar) and other.is_enabled),
        leave=False,
        dynamic_ncols=True,
        file=sys.stdout,
        mininterval=0.5 if sys.stdout.isatty() else 30.0,  # in a log file each refresh is one line
    )
