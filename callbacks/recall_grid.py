"""Accuracy of recall over needles, length, depth and window, with the recurrent state on, cleared and off.

Shapes: S ensemble members, B rows, T positions, Q queries, V vocabulary, P parts of a row; an axis of length 2 holds
outside and inside of the window.
"""

import json
from dataclasses import dataclass
from itertools import product
from typing import Any, cast, get_args

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.base import check_positive
from callbacks.probe import Probe, batch_on
from datamodules import NeedleGym
from datamodules.batch import TokenBatch
from datamodules.errors import UserError
from datamodules.needle_gym import Kind
from datamodules.sequence_task import Split
from lightning_modules.core.ensemble_module import EnsembleModule
from lightning_modules.core.files import replacing
from lightning_modules.core.reporting import (
    add_figure,
    add_text,
    is_dry_run,
    logged_step,
    record_proportion,
    report_members,
    run_folder,
)
from lightning_modules.groundthink.probes import recall, recall_report
from lightning_modules.groundthink.probes.needles import Queries, answers, first_queries
from lightning_modules.groundthink.probes.silence import State, delta_mixers, state_set

MOST_LOGITS = 2**24  # logits in memory at once, of all members
RULER: dict[str, dict[str, Any]] = {  # keys, values and queries -> knobs; RULER makes a key for each query
    "1_1_1": {"task": "single", "needles": 1, "queries": None},
    "4_1_1": {"task": "multi_key", "needles": 4, "queries": 1},
    "1_4_1": {"task": "multi_value", "needles": 1, "queries": None, "repeats": 4},
    "1_1_4": {"task": "multi_key", "needles": 4, "queries": None},
}


@dataclass(frozen=True)
class _Point:
    """A point of the grid: the task with other knobs, and the name of its measure."""

    name: str
    task: NeedleGym


class RecallGrid(Probe):
    """Measures the accuracy of queries on held-out rows of `NeedleGym`, over a grid of needles and lengths.

    It runs at the end of `validate` and `test`, and at some validations of a fit; `<stage>` is `validation` or `test`.
    For each kind of rows, number of needles N and length T of the grid:

    - `<stage>/recall_<task>_n<N>_t<T>`: share of queries whose label has the largest logit;
    - the same with `_inside` and `_outside`: of the queries whose value window attention can see, and of the others, if
      the model has window attention. Windows of several layers add up: sum(W - 1) positions back are inside;
    - the same with `_cleared`: with the recurrent state cleared right before the first query of each row, where window
      attention may still see what the positions before it had read; and with `_off`: with nothing ever written, so that
      window attention is all there is. Only if the model has gated delta mixers;
    - `<stage>/ruler_<keys>_<values>_<queries>_t<T>`: `string_match_all` on RULER's axes 1/1/1, 4/1/1, 1/4/1 and 1/1/4
      (Hsieh et al. 2024, arXiv:2404.06654): the share of answers among the most likely tokens, as many as the queried
      key has values.

    Each has its number of queries, and for a single model its Wilson interval. All of them by depth, the part of the
    row in which the needle begins, are lines of `recall/<stage>-<step>.jsonl` in the run's folder and a table in
    loggers that take texts (of the first ensemble member). Heat maps go to loggers that take figures.

    Every key is queried. Keys, values, filler and the other knobs are those of the data. Rows are the same for each
    model, rank and batch size. Points of the grid that do not fit, such as more needles than a row holds, are left out.
    The course of training is the same as without the callback.

    Example::

        trainer:
          callbacks+:
            - class_path: RecallGrid
              init_args: {needles: [4, 8, 16], lengths: [64, 256, 1024], tasks: [mqar, multi_key]}

    Args:
        needles: N of each point; None for those of the data.
        lengths: T of each point; None for 1, 4 and 16 times the rows of the data.
        tasks: Kinds of rows; None for that of the data.
        depths: P, parts of a row that are counted apart.
        rows: Rows per point.
        ruler: Also measure RULER's axes.
        every_n_steps: In a fit, measure at the first validation after each n optimizer steps; 0 for never.

    Raises:
        UserError: A number is too small or a kind is unknown; at `setup`, the data has no `NeedleGym`, no point of the
            grid fits, the model has positions for shorter rows only, or there are two of these callbacks.
    """

    def __init__(
        self,
        needles: list[int] | None = None,
        lengths: list[int] | None = None,
        tasks: list[Kind] | None = None,
        depths: int = 4,
        rows: int = 64,
        ruler: bool = True,
        every_n_steps: int = 0,
    ) -> None:
        super().__init__(rows, every_n_steps)
        check_positive(self, depths=depths)
        for name, values in {"needles": needles, "lengths": lengths, "tasks": tasks}.items():
            if values is not None and not values:
                raise UserError(f"RecallGrid.{name} is empty: give at least one, or leave the key out")
        for name, numbers in {"needles": needles or [], "lengths": lengths or []}.items():
            check_positive(self, **{f"{name}[{place}]": number for place, number in enumerate(numbers)})
        self.needles, self.lengths, self.tasks = needles, lengths, tasks
        self.depths, self.ruler = depths, ruler
        self._points: list[_Point] = []
        self._axes: list[_Point] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the points of the grid."""
        super().setup(trainer, pl_module, stage)
        data = self.task(trainer, NeedleGym, "the task NeedleGym")
        lengths = self.lengths or [data.seq_len, 4 * data.seq_len, 16 * data.seq_len]
        grid = product(self.tasks or [data.task], self.needles or [data.needles], lengths)
        knobs = {f"{task}_n{n}_t{t}": {"task": task, "needles": n, "seq_len": t} for task, n, t in grid}
        self._points, refusal = _fitting(data, knobs)
        if not self._points:
            raise UserError(f"RecallGrid: no point of the grid fits the data, for instance {refusal}")
        axes = {f"{name}_t{t}": knobs | {"seq_len": t} for name, knobs in RULER.items() for t in lengths}
        self._axes = _fitting(data, axes)[0] if self.ruler else []
        self.check_length(pl_module, max(point.task.seq_len for point in self._points + self._axes))

    def measure(self, trainer: Trainer, module: EnsembleModule, split: Split) -> None:
        """Measure and report every point."""
        states: tuple[State, ...] = get_args(State) if delta_mixers(module.network) else ("on",)
        reach = recall.window_reach(module.network)
        cells: list[list[recall_report.Cell]] = [[] for _ in range(module.ensemble)]
        for point in self._points:
            for state in states:
                hits_SP2, count_P2 = self._tally(trainer, module, point.task, split, state, reach)
                task = point.task
                for own, hits_P2 in zip(cells, hits_SP2, strict=True):
                    own.append(recall_report.Cell(task.task, task.needles, task.seq_len, state, hits_P2, count_P2))
                name = f"{split}/recall_{point.name}" + ("" if state == "on" else f"_{state}")
                self._report(trainer, module, name, hits_SP2.sum((1, 2)), int(count_P2.sum()))
                if state == "on" and reach is not None:
                    for inside, side in enumerate(("outside", "inside")):
                        hits_S, count = hits_SP2[:, :, inside].sum(1), int(count_P2[:, inside].sum())
                        self._report(trainer, module, f"{name}_{side}", hits_S, count)
        for point in self._axes:
            found_S, count = self._found(trainer, module, point.task, split)
            self._report(trainer, module, f"{split}/ruler_{point.name}", found_S, count)
        self._show(trainer, cells, split, reach is not None)

    def _report(self, trainer: Trainer, module: EnsembleModule, name: str, hits_S: Tensor, count: int) -> None:
        if count:
            report_members(trainer, module, {name: hits_S / count})
            record_proportion(module, name, hits_S, count)

    def _tally(
        self, trainer: Trainer, module: EnsembleModule, task: NeedleGym, split: Split, state: State, reach: int | None
    ) -> tuple[Tensor, Tensor]:
        """Return hits [S, P, 2] and queries [P, 2] over the rows of all ranks, on the CPU."""
        hits_SP2 = torch.zeros(module.ensemble, self.depths, 2, dtype=torch.float64, device=module.device)
        count_P2 = torch.zeros(self.depths, 2, dtype=torch.float64, device=module.device)
        for batch in self._batches(trainer, module, task, split):
            queries = Queries.of(batch)
            with state_set(module.network, state, first_queries(batch["labels"])):
                logits_SQV = _logits(module, batch, queries)
            hits, count = recall.tally(
                recall.hits(logits_SQV, queries.label_Q), queries, task.seq_len, self.depths, reach
            )
            hits_SP2, count_P2 = hits_SP2 + hits, count_P2 + count
        return _over_ranks(trainer, hits_SP2), _over_ranks(trainer, count_P2)

    def _found(self, trainer: Trainer, module: EnsembleModule, task: NeedleGym, split: Split) -> tuple[Tensor, int]:
        """Return the answers found by each member, and the answers, over the rows of all ranks."""
        found_S = torch.zeros(module.ensemble + 1, dtype=torch.float64, device=module.device)
        for batch in self._batches(trainer, module, task, split):
            queries = Queries.of(batch)
            answer_QR = answers(batch, queries)
            found_S[:-1] += recall.found(_logits(module, batch, queries), answer_QR).sum(1)
            found_S[-1] += answer_QR.numel()
        found_S = _over_ranks(trainer, found_S)
        return found_S[:-1], int(found_S[-1])

    def _batches(self, trainer: Trainer, module: EnsembleModule, task: NeedleGym, split: Split) -> list[TokenBatch]:
        """Return this rank's rows in batches whose logits fit into memory."""
        rows_B2T = task.fixed(split, self.count(trainer))[trainer.global_rank :: trainer.world_size]
        size = max(1, MOST_LOGITS // (module.ensemble * task.seq_len * task.vocab_size))
        return [batch_on(module, rows_B2T[start : start + size]) for start in range(0, len(rows_B2T), size)]

    def _show(self, trainer: Trainer, cells: list[list[recall_report.Cell]], split: Split, windowed: bool) -> None:
        folder = run_folder(trainer)  # on all ranks
        if not trainer.is_global_zero or is_dry_run(trainer):
            return
        by_member = [recall_report.lines(own, windowed) for own in cells]
        path = folder / "recall" / f"{split}-{trainer.global_step}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as draft:
            plain = [{"member": s} | line.plain for s, own in enumerate(by_member) for line in own]
            draft.write_text("".join(f"{json.dumps(line)}\n" for line in plain))
        step = logged_step(trainer)
        add_text(trainer, f"{split}/recall", recall_report.markdown(by_member[0]), step)
        for kind in dict.fromkeys(cell.task for cell in cells[0]):
            figure = recall_report.heat_map([cell for cell in cells[0] if cell.task == kind])
            add_figure(trainer, f"{split}/recall_{kind}", figure, step)


def _fitting(data: NeedleGym, knobs: dict[str, dict[str, Any]]) -> tuple[list[_Point], str]:
    """Return the points that fit the data, and why the last one of the others does not."""
    points, refusal = [], ""
    for name, values in knobs.items():
        try:
            points.append(_Point(name, data.tuned({"queries": None} | values)))
        except UserError as error:
            refusal = str(error)
    return points, refusal


def _logits(module: EnsembleModule, batch: TokenBatch, queries: Queries) -> Tensor:
    return module.call(batch["tokens"])[0][:, queries.row_Q, queries.time_Q].float()


def _over_ranks(trainer: Trainer, x: Tensor) -> Tensor:
    return cast(Tensor, trainer.strategy.reduce(x, reduce_op="sum")).cpu()
