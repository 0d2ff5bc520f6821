"""Monitors whether a model keeps what it has learnt: how often a measure reached its level, collapsed and recovered.

Shapes: S ensemble members (1 for an ordinary module).
"""

from difflib import get_close_matches
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from callbacks.base import refuse_second
from datamodules.errors import MOST, UserError, check_numbers
from lightning_modules.core.contracts import HasMembers
from lightning_modules.core.reporting import report_members


class StabilityEvents:
    """Counts collapses and recoveries of a measure over its checks, for each member by itself.

    A member comes up at a value >= `reached`. It collapses at a value < `collapsed` while it is up, and is down then.
    If it comes up again, it has recovered. Values between the two levels, and NaN, change nothing.

    Args:
        members: S.
        reached: The level at which a member comes up.
        collapsed: The level below which it collapses, at most `reached`.
        settle: Checks after coming up, without a collapse, that make a member stable.
    """

    def __init__(self, members: int, reached: float, collapsed: float, settle: int) -> None:
        self.reached = reached
        self.collapsed = collapsed
        self.settle = settle
        self.state = {
            "up_S": torch.zeros(members, dtype=torch.bool),
            "checks_up_S": torch.zeros(members, dtype=torch.long),  # after the check at which it last came up
            "collapses_S": torch.zeros(members, dtype=torch.long),
            "recoveries_S": torch.zeros(members, dtype=torch.long),
            "reached_step_S": torch.full((members,), torch.nan),
            "escape_step_S": torch.full((members,), torch.nan),
        }

    def update(self, step: int, values_S: Tensor) -> None:
        """Add one check, made at optimizer step `step`."""
        state = self.state
        rises_S = ~state["up_S"] & (values_S >= self.reached)
        falls_S = state["up_S"] & (values_S < self.collapsed)
        first_S = rises_S & state["reached_step_S"].isnan()
        state["up_S"] = (state["up_S"] | rises_S) & ~falls_S
        state["checks_up_S"] = torch.where(state["up_S"] & ~rises_S, state["checks_up_S"] + 1, 0)
        state["collapses_S"] = state["collapses_S"] + falls_S
        # Only a collapse takes a member down, so a member that rises a second time recovers from one.
        state["recoveries_S"] = state["recoveries_S"] + (rises_S & ~first_S)
        state["reached_step_S"] = torch.where(first_S, float(step), state["reached_step_S"])
        state["escape_step_S"] = torch.where(rises_S, float(step), state["escape_step_S"])
        state["escape_step_S"] = torch.where(state["up_S"], state["escape_step_S"], torch.nan)

    def measures(self) -> dict[str, Tensor]:
        """Return name -> values_S, as `StabilityMonitor` describes them."""
        state = self.state
        return {
            "reached_step": state["reached_step_S"],
            "collapses": state["collapses_S"],
            "recoveries": state["recoveries_S"],
            "escape_step": state["escape_step_S"],
            "stable": state["up_S"] & (state["checks_up_S"] >= self.settle),
        }


class StabilityMonitor(Callback):
    """Logs, at each validation during training, the collapses and recoveries of a measure that validation logs.

    For each ensemble member, which is up from a check >= `reached` until a check < `collapsed`:

    - `stability/reached_step`: the optimizer step at which it first came up; NaN if it never did;
    - `stability/collapses`, `stability/recoveries`: how often it went down, and came up again after that;
    - `stability/escape_step`: the step at which it came up for the last time, if it is up now, else NaN;
    - `stability/stable`: 1 if it is up now and `settle` checks have passed since it last came up, else 0.

    A dip that stays at or above `collapsed` is no collapse. Steps are those of the checks, so an event is known to
    within the interval between validations. Checkpoints hold the counts, and a resumed run goes on from them. The
    sanity check before training, and validation outside fit, do not count.

    Example::

        trainer:
          callbacks+:
            - {class_path: StabilityMonitor, init_args: {metric: validation/accuracy, reached: 0.99, collapsed: 0.9}}

    Args:
        metric: The measure. Each member's value counts if the module keeps values of members, else the logged value.
        reached: The level at which a member comes up.
        collapsed: The level below which it collapses.
        settle: Checks after coming up that make a member stable.

    Raises:
        UserError: `collapsed` is above `reached`, or a number is out of range; at `setup`, there are two of these
            callbacks; at the end of a validation, the metric was not logged.
    """

    def __init__(
        self, metric: str = "validation/accuracy", reached: float = 0.99, collapsed: float = 0.9, settle: int = 5
    ) -> None:
        check_numbers("StabilityMonitor", -MOST, reached=reached, collapsed=collapsed)
        check_numbers("StabilityMonitor", 0, settle=settle)
        if collapsed > reached:
            raise UserError(f"StabilityMonitor: `collapsed` ({collapsed}) must not be above `reached` ({reached}).")
        self.metric = metric
        self.reached = reached
        self.collapsed = collapsed
        self.settle = settle
        self._events: StabilityEvents | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a second monitor, and forget an earlier fit."""
        refuse_second(trainer, self)
        if stage == "fit":
            self._events = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add one check. The module logs its metrics in `on_validation_epoch_end`, which comes before this hook."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        values_S = self._values(trainer, pl_module).detach().float().reshape(-1).cpu()
        if self._events is None:
            self._events = self._new_events(len(values_S))
        self._events.update(trainer.global_step, values_S)
        measures = {f"stability/{name}": value_S for name, value_S in self._events.measures().items()}
        report_members(trainer, pl_module, measures, shares=["stability/stable"])

    def _values(self, trainer: Trainer, pl_module: LightningModule) -> Tensor:
        members = pl_module.members if isinstance(pl_module, HasMembers) else {}
        for values in (members, trainer.callback_metrics):
            if self.metric in values:
                return values[self.metric]
        names = {*members, *trainer.callback_metrics}
        nearest = ", ".join(map(repr, get_close_matches(self.metric, names, n=5, cutoff=0.0))) or "none at all"
        raise UserError(f"StabilityMonitor: validation logs no {self.metric!r}; the nearest names are: {nearest}.")

    def _new_events(self, members: int) -> StabilityEvents:
        return StabilityEvents(members, self.reached, self.collapsed, self.settle)

    def state_dict(self) -> dict[str, Any]:
        """Return the counts."""
        return {} if self._events is None else dict(self._events.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the counts."""
        self._events = self._new_events(len(state_dict["up_S"]))
        self._events.state.update(state_dict)
