"""Monitors how fast groups of parameters move, and at which step each came to rest.

Shapes: G groups, S ensemble members (1 for an ordinary module).
"""

from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn

from callbacks.base import check_positive, refuse_shared
from datamodules.errors import UserError
from lightning_modules.core.reporting import ensemble_size, report_members
from lightning_modules.core.sites import match_parameters


def drift_rate(now: Sequence[Tensor], before: Sequence[Tensor], steps: int, members: int = 1) -> Tensor:
    """Return v = |now - before| / (steps |now|), with norms over all tensors together; 0 for zeros that stay zeros.

    The function does not synchronise the device.

    Args:
        now: The parameters; each begins with the member axis if `members` is above 1.
        before: The same parameters `steps` optimizer steps ago.
        steps: tau.
        members: S.

    Returns:
        v_S, a fraction of the norm per step.
    """
    moved_S = _norm([new - old for new, old in zip(now, before, strict=True)], members)
    return torch.where(moved_S == 0, 0.0, moved_S / (steps * _norm(now, members)))  # NaN stays: it is not at rest


def _norm(tensors: Sequence[Tensor], members: int) -> Tensor:
    norms = [tensor.detach().float().reshape(members, -1).norm(dim=1) for tensor in tensors]
    norm_S: Tensor = torch.stack(norms).norm(dim=0)
    return norm_S


class DriftMonitor(Callback):
    """Logs how fast groups of parameters drift, and the step at which each group came to rest.

    Every tau = `every_n_steps` optimizer steps, for each group and each ensemble member:

    - `drift/<group>`: v_t = |theta_t - theta_{t-tau}| / (tau |theta_t|), with norms over all parameters of the group;
    - `drift/<group>_freeze_step`: the step of the first of `patience` checks in a row with v < `eps`; NaN until then.
      A group that moves again later keeps the step;
    - `drift/<group>_frozen`: 1 if there is such a step, else 0. Its mean is the proportion of members that froze.

    The first check compares with the parameters at the start of training. Checkpoints hold the parameters of the last
    check and the counts, so that a resumed run reports what the uninterrupted run does. A monitor with other arguments
    starts anew. The monitor does not slow other steps: it computes and synchronises nothing there. Every rank must hold
    whole parameters.

    Example::

        trainer:
          callbacks+:
            - class_path: DriftMonitor
              init_args: {every_n_steps: 500, groups: {q: ["*.q_proj.*"], k: ["*.k_proj.*"], mlp: ["*.mlp.*"]}}

    Args:
        groups: Name of a group -> name patterns of its parameters, see `lightning_modules.core.sites`. Groups may
            overlap.
        every_n_steps: tau, optimizer steps between checks.
        eps: The drift per step below which a group is at rest.
        patience: Number of checks in a row that make a freeze.

    Raises:
        UserError: There is no group, a group has no pattern, or a number is not positive; at `setup` for fit, a pattern
            matches nothing, a parameter of an ensemble has no member axis, or two monitors have a group of one name.
    """

    def __init__(
        self, groups: dict[str, list[str]], every_n_steps: int = 100, eps: float = 1e-5, patience: int = 3
    ) -> None:
        if not groups or not all(groups.values()):
            raise UserError("DriftMonitor needs at least one group of parameters, and a name pattern in each.")
        check_positive(self, every_n_steps=every_n_steps, eps=eps, patience=patience)
        self.groups = groups
        self.every_n_steps = every_n_steps
        self.eps = eps
        self.patience = patience
        self._parameters: dict[str, dict[str, nn.Parameter]] = {}
        self._state: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """Return a key that differs between two monitors of one trainer, and between monitors of other arguments."""
        arguments = {"every_n_steps": self.every_n_steps, "eps": self.eps, "patience": self.patience}
        return self._generate_state_key(groups=self.groups, **arguments)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the patterns and the member axes, and forget an earlier fit."""
        if stage != "fit":
            return
        refuse_shared(trainer, self, lambda monitor: [f"drift/{group}" for group in monitor.groups], "log")
        self._state = {}
        members = ensemble_size(pl_module)
        for group, patterns in self.groups.items():
            for name, parameter in match_parameters(pl_module, patterns, "DriftMonitor.groups").items():
                if members > 1 and parameter.shape[:1] != (members,):
                    shape = tuple(parameter.shape)
                    raise UserError(f"DriftMonitor: {name} of {group!r} has no axis of {members} members: {shape}.")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Copy the parameters for the first check, unless a checkpoint has restored them."""
        # Not in `setup`, because a sharding strategy may have replaced the parameter objects since.
        self._parameters = {group: match_parameters(pl_module, names) for group, names in self.groups.items()}
        if not self._state:
            shape = len(self.groups), ensemble_size(pl_module)
            self._state = {
                "streak_GS": torch.zeros(shape, dtype=torch.long),  # checks in a row below eps
                "since_GS": torch.full(shape, torch.nan),  # the first step of that row
                "freeze_step_GS": torch.full(shape, torch.nan),
            }
            self._copy_parameters(trainer.global_step)
        device = pl_module.device
        self._state["before"] = {name: value.to(device) for name, value in self._state["before"].items()}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: STEP_OUTPUT, batch: object, batch_idx: int
    ) -> None:
        """Measure and report at the end of an interval."""
        # The interval counts from the last check, which a checkpoint restores, so that tau is the same in every check.
        steps = trainer.global_step - self._state["step"]
        if steps < self.every_n_steps:
            return
        before, members = self._state["before"], ensemble_size(pl_module)
        rates = [
            drift_rate([*group.values()], [before[name] for name in group], steps, members)
            for group in self._parameters.values()
        ]
        rates_GS = torch.stack(rates).cpu()
        self._copy_parameters(trainer.global_step)
        self._count(rates_GS)
        freeze_step_GS = self._state["freeze_step_GS"]
        measures = {}
        for group, rate_S, freeze_step_S in zip(self.groups, rates_GS, freeze_step_GS, strict=True):
            measures[f"drift/{group}"] = rate_S
            measures[f"drift/{group}_freeze_step"] = freeze_step_S
            measures[f"drift/{group}_frozen"] = (~freeze_step_S.isnan()).float()
        report_members(trainer, pl_module, measures, shares=[f"drift/{group}_frozen" for group in self.groups])

    def _copy_parameters(self, step: int) -> None:
        parameters = {name: p for group in self._parameters.values() for name, p in group.items()}
        self._state["step"] = step
        self._state["before"] = {name: p.detach().clone() for name, p in parameters.items()}

    def _count(self, rates_GS: Tensor) -> None:
        state, at_rest_GS = self._state, rates_GS < self.eps
        begins_GS = at_rest_GS & (state["streak_GS"] == 0)
        state["since_GS"] = torch.where(begins_GS, float(state["step"]), state["since_GS"])
        state["streak_GS"] = torch.where(at_rest_GS, state["streak_GS"] + 1, 0)
        freezes_GS = (state["streak_GS"] >= self.patience) & state["freeze_step_GS"].isnan()
        state["freeze_step_GS"] = torch.where(freezes_GS, state["since_GS"], state["freeze_step_GS"])

    def state_dict(self) -> dict[str, Any]:
        """Return the parameters of the last check, and the counts."""
        return dict(self._state)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the parameters of the last check, and the counts."""
        self._state = dict(state_dict)
