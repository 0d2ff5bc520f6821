"""Accuracy of each group of queries that a task tells apart, such as test sets or positions.

Shapes: S ensemble members, B rows, T positions, V vocabulary, G groups.
"""

from itertools import islice
from typing import Protocol, cast, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.at_validations import AtValidations
from callbacks.base import refuse_second
from callbacks.held_out import evaluation
from callbacks.throughput import off_the_clock
from datamodules.batch import IGNORE, TokenBatch
from datamodules.errors import UserError
from datamodules.loader import BatchLoader
from datamodules.mixture import main_task
from datamodules.sequence_task import Split
from lightning_modules.core.contracts import connected
from lightning_modules.core.ensemble_module import EnsembleModule
from lightning_modules.core.intervals import mean_interval
from lightning_modules.core.metrics import TokenMeasures
from lightning_modules.core.reporting import record_proportion, report_members


@runtime_checkable
class HasGroups(Protocol):
    """A task whose queries belong to groups.

    Attributes:
        groups: Their names.
    """

    groups: list[str]

    def group_of(self, batch: TokenBatch) -> Tensor:
        """Return the index in `groups` of each query, int64 [B, T]."""
        ...


class GroupAccuracy(AtValidations):
    """Measures the accuracy of each group of queries on the held-out set.

    It runs at the end of `validate` and `test`, and at some validations of a fit; `<stage>` is `validation` or `test`.

    - `<stage>/accuracy_<group>`: share of the group's queries whose label has the strictly largest logit, with the
      number of queries, and for a single model the Wilson interval. Groups without queries are left out;
    - `<stage>/accuracy_by_group`: the mean over groups, for a single model with an interval. `<stage>/accuracy` is that
      over all queries, in which a group with many counts more.

    Groups are the test sets of `AssociativeRecall`, octaves of the position in `StateTracking`, and octaves of the
    distance in `NeedleGym`; of a `Mixture`, those of the task that is validated and tested.

    Example::

        trainer:
          callbacks+:
            - {class_path: GroupAccuracy}

    Args:
        every_n_steps: In a fit, measure at the first validation after each n optimizer steps; 0 for never.

    Raises:
        UserError: The number is negative; at `setup`, the data has no groups, the module is no model of token
            sequences, or there are two of these callbacks.
    """

    def __init__(self, every_n_steps: int = 0) -> None:
        super().__init__(every_n_steps)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse data without groups, other modules, and a second callback of the class."""
        refuse_second(trainer, self)
        if not isinstance(pl_module, EnsembleModule):
            name = type(pl_module).__name__
            raise UserError(f"GroupAccuracy reads models of token sequences, such as GroundThink, not {name}")
        self._task(trainer)

    def at_validation(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the validation set."""
        self._measure(trainer, cast(EnsembleModule, pl_module), "validation")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the test set."""
        self._measure(trainer, cast(EnsembleModule, pl_module), "test")

    def _task(self, trainer: Trainer) -> HasGroups:
        task = main_task(connected(trainer).datamodule)
        if not isinstance(task, HasGroups):
            raise UserError(f"GroupAccuracy needs data with groups, such as StateTracking, not {type(task).__name__}")
        return task

    def _batches(self, trainer: Trainer, split: Split) -> tuple[BatchLoader[TokenBatch], int]:
        """Return the held-out set, and how many of its batches the trainer takes."""
        data = connected(trainer).datamodule
        assert data is not None  # see `_task`
        if split == "validation":
            return data.val_dataloader(), int(trainer.num_val_batches[0])
        return data.test_dataloader(), int(trainer.num_test_batches[0])

    def _measure(self, trainer: Trainer, module: EnsembleModule, split: Split) -> None:
        task = self._task(trainer)
        hits_SG = torch.zeros(module.ensemble, len(task.groups), dtype=torch.float64, device=module.device)
        count_G = torch.zeros(len(task.groups), dtype=torch.float64, device=module.device)
        measures = TokenMeasures(module.ensemble).to(module.device)
        with off_the_clock(trainer), evaluation(trainer, module):
            for batch in islice(*self._batches(trainer, split)):
                tokens_BT, labels_BT = (batch[key].to(module.device) for key in ("tokens", "labels"))
                group_N = task.group_of({"tokens": tokens_BT, "labels": labels_BT})[labels_BT != IGNORE]
                scores = measures.add_scores(module.call(tokens_BT)[0], labels_BT)
                hits_SG.index_add_(1, group_N, scores.hits_SN)
                count_G.index_add_(0, group_N, torch.ones_like(group_N, dtype=torch.float64))
        hits_SG, count_G = (cast(Tensor, trainer.strategy.reduce(x, reduce_op="sum")).cpu() for x in (hits_SG, count_G))
        filled = [group for group, count in enumerate(count_G.tolist()) if count]
        share_SG = hits_SG / count_G
        names = {group: f"{split}/accuracy_{task.groups[group]}" for group in filled}
        shares = {name: share_SG[:, group] for group, name in names.items()}
        mean_S = share_SG[:, filled].mean(1)
        report_members(trainer, module, shares | {f"{split}/accuracy_by_group": mean_S})
        for group, name in names.items():
            record_proportion(module, name, hits_SG[:, group], int(count_G[group]))
        module.intervals.pop(f"{split}/accuracy_by_group", None)
        if module.ensemble == 1 and filled:
            hits_G, counts_G = hits_SG[0, filled].tolist(), count_G[filled].tolist()
            module.intervals[f"{split}/accuracy_by_group"] = mean_interval(hits_G, counts_G)
