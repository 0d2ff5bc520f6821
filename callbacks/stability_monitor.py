"""Whether what was learnt stays learnt: how often a measure reached its level, collapsed and recovered.

Shapes: S members of an ensemble (1 for an ordinary module).
"""

from difflib import get_close_matches
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from datamodules.errors import UserError
from lightning_modules.core.reporting import refuse_second, report_members


class StabilityEvents:
    """Counts what happens to a measure over its checks, for each member alone.

    A member comes up at a value >= `reached`. It collapses at a value < `collapsed` while up, and is then down; if it
    comes up again it has recovered. Values between the two change nothing, and neither does NaN.

    Args:
        members: S.
        reached: The level at which a member is up.
        collapsed: The level below which it is down again, at most `reached`.
        settle: Checks after coming up, without a collapse, that make it stable.
    """

    def __init__(self, members: int, reached: float, collapsed: float, settle: int) -> None:
        self.reached = reached
        self.collapsed = collapsed
        self.settle = settle
        self.state = {
            "up_S": torch.zeros(members, dtype=torch.bool),
            "checks_up_S": torch.zeros(members, dtype=torch.long),  # since it last came up, that check not counted
            "collapses_S": torch.zeros(members, dtype=torch.long),
            "recoveries_S": torch.zeros(members, dtype=torch.long),
            "reached_step_S": torch.full((members,), torch.nan),
            "escape_step_S": torch.full((members,), torch.nan),
        }

    def update(self, step: int, values_S: Tensor) -> None:
        """Takes in one check, made at optimizer step `step`."""
        state = self.state
        rises_S = ~state["up_S"] & (values_S >= self.reached)
        falls_S = state["up_S"] & (values_S < self.collapsed)
        first_S = rises_S & state["reached_step_S"].isnan()
        state["up_S"] = (state["up_S"] | rises_S) & ~falls_S
        state["checks_up_S"] = torch.where(state["up_S"] & ~rises_S, state["checks_up_S"] + 1, 0)
        state["collapses_S"] = state["collapses_S"] + falls_S
        # Only a collapse takes a member down, so whoever rises a second time recovers from one.
        state["recoveries_S"] = state["recoveries_S"] + (rises_S & ~first_S)
        state["reached_step_S"] = torch.where(first_S, float(step), state["reached_step_S"])
        state["escape_step_S"] = torch.where(rises_S, float(step), state["escape_step_S"])
        state["escape_step_S"] = torch.where(state["up_S"], state["escape_step_S"], torch.nan)

    def measures(self) -> dict[str, Tensor]:
        """Name -> values_S, as `StabilityMonitor` describes them."""
        state = self.state
        return {
            "reached_step": state["reached_step_S"],
            "collapses": state["collapses_S"],
            "recoveries": state["recoveries_S"],
            "escape_step": state["escape_step_S"],
            "stable": state["up_S"] & (state["checks_up_S"] >= self.settle),
        }


class StabilityMonitor(Callback):
    """Logs, at each validation amid training, what has happened so far to a measure that validation logs.

    For each member, where it is up from a check >= `reached` until a check < `collapsed`:

    - `stability/reached_step`: the optimizer step at which it first came up; NaN if it never did;
    - `stability/collapses`, `stability/recoveries`: how often it went down, and came up again after that;
    - `stability/escape_step`: the step at which it came up for the last time, if it is up now; else NaN;
    - `stability/stable`: 1 if it is up now, and `settle` checks have passed since it last came up; else 0.

    Dips that stay at or above `collapsed` are no collapses. Steps are those of the checks: events are known to within
    the interval between validations. The counts are in checkpoints and go on in a resumed run. The sanity check before
    training, and validation outside fit, are left out.

    Args:
        metric: The measure; every member's own value, if the module keeps one, else the one that was logged.
        reached: The level at which a member is up.
        collapsed: The level below which it is down again.
        settle: Checks after coming up that make it stable.

    Raises:
        UserError: At once, if `collapsed` is above `reached` or `settle` is negative; at `setup`, if there are two of
            these; at the end of a validation that has not logged the metric.
    """

    def __init__(
        self, metric: str = "validation/accuracy", reached: float = 0.99, collapsed: float = 0.9, settle: int = 5
    ) -> None:
        if collapsed > reached:
            raise UserError(f"StabilityMonitor: `collapsed` ({collapsed}) must not be above `reached` ({reached}).")
        if settle < 0:
            raise UserError(f"StabilityMonitor: `settle` counts checks from 0, got {settle}.")
        self.metric = metric
        self.reached = reached
        self.collapsed = collapsed
        self.settle = settle
        self._events: StabilityEvents | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets an earlier fit."""
        refuse_second(trainer, self)
        if stage == "fit":
            self._events = None

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes in one check: after `on_validation_epoch_end`, in which the module's own metrics come last."""
        if trainer.sanity_checking or trainer.state.fn != TrainerFn.FITTING:
            return
        members = getattr(pl_module, "members", None) or {}
        known = members if self.metric in members else trainer.callback_metrics
        if self.metric not in known:
            nearest = ", ".join(map(repr, get_close_matches(self.metric, {*members, *known}, n=5, cutoff=0.0)))
            nearest = nearest or "none at all"
            raise UserError(f"StabilityMonitor: validation logs no {self.metric!r}; the nearest names are: {nearest}.")
        values_S = known[self.metric].detach().float().reshape(-1).cpu()
        if self._events is None:
            self._events = self._begin(len(values_S))
        self._events.update(trainer.global_step, values_S)
        measures = {f"stability/{name}": value_S for name, value_S in self._events.measures().items()}
        report_members(trainer, pl_module, measures, shares=["stability/stable"])

    def _begin(self, members: int) -> StabilityEvents:
        return StabilityEvents(members, self.reached, self.collapsed, self.settle)

    def state_dict(self) -> dict[str, Any]:
        """The counts so far."""
        return {} if self._events is None else dict(self._events.state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Goes on from them."""
        self._events = self._begin(len(state_dict["up_S"]))
        self._events.state.update(state_dict)
