"""Drift follows its formula, and a resumed run reports what the uninterrupted run does."""

import math

import pytest
import torch
from conftest import QUIET
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from callbacks.drift_monitor import DriftMonitor, drift_rate
from datamodules.errors import UserError

GROUPS = {"moving": ["a", "b"], "still": ["c"]}


class Ramps(LightningModule):
    """SGD on sums: every element of a and b falls by `pace` per step until `halts_at`; c is not in the loss."""

    def __init__(self, ensemble=1, pace=(0.5,), halts_at=math.inf):
        super().__init__()
        self.ensemble = ensemble
        self.members = {}
        axis = (ensemble,) if ensemble > 1 else ()
        self.a = nn.Parameter(torch.full((*axis, 2), 10.0))
        self.b = nn.Parameter(torch.full((*axis, 1, 2), 10.0))
        self.c = nn.Parameter(torch.zeros(*axis, 3))
        self.pace = torch.tensor(pace) if ensemble > 1 else torch.tensor(pace[0])
        self.halts_at = halts_at

    def training_step(self, batch, batch_idx):
        pace = self.pace * (self.global_step < self.halts_at)
        return (pace * (self.a.sum(-1) + self.b.sum((-2, -1)))).sum() + 0 * self.c.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


class Trace(DriftMonitor):
    """Keeps the measures of each check."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.trace = {}

    def on_train_batch_end(self, trainer, pl_module, *args):
        before = self._state["step"]
        super().on_train_batch_end(trainer, pl_module, *args)
        if self._state["step"] > before:
            self.trace[trainer.global_step] = {name: value.clone() for name, value in pl_module.members.items()}


def fit(module, tmp_path, monitor, max_steps, ckpt_path=None, **flags):
    flags = QUIET | {"accelerator": "cpu", "max_steps": max_steps, "default_root_dir": tmp_path} | flags
    trainer = Trainer(callbacks=monitor, **flags)
    trainer.fit(module, DataLoader(torch.zeros(100, 1)), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_rate_of_a_known_step():
    before, now = [torch.tensor([[3.0, 0.0]]), torch.tensor([1.0])], [torch.tensor([[3.0, 3.0]]), torch.tensor([-3.0])]
    # |(0, 3, -4)| = 5 in ten steps, and |(3, 3, -3)| = sqrt 27
    torch.testing.assert_close(drift_rate(now, before, 10), torch.tensor([5 / (10 * math.sqrt(27))]))


def test_rate_of_an_ensemble_is_that_of_each_member():
    before, now = [torch.randn(3, 4, 2), torch.randn(3, 5)], [torch.randn(3, 4, 2), torch.randn(3, 5)]
    rate_S = drift_rate(now, before, 7, members=3)
    for member in range(3):
        alone = drift_rate([x[member] for x in now], [x[member] for x in before], 7)
        torch.testing.assert_close(rate_S[member], alone[0])


def test_zeros_that_stay_have_rate_0_and_values_that_become_zero_have_an_infinite_rate():
    zero, one = [torch.zeros(3)], [torch.ones(3)]
    assert drift_rate(zero, zero, 5).item() == 0
    assert drift_rate(zero, one, 5).item() == math.inf


def test_a_member_that_is_not_finite_is_not_at_rest(tmp_path):
    lost = [torch.tensor([[torch.nan, 1.0], [1.0, 1.0], [torch.inf, 1.0]])]
    assert drift_rate(lost, lost, 5, members=3).isnan().tolist() == [True, False, True]
    module, monitor = Ramps(ensemble=2, pace=(0.0, 0.0)), Trace(GROUPS, every_n_steps=1, patience=2)
    module.a.data[0] = torch.nan
    fit(module, tmp_path, monitor, 4)
    assert module.members["drift/moving_frozen"].tolist() == [0, 1]


def test_checks_of_a_ramp(tmp_path):
    module, monitor = Ramps(), Trace(GROUPS, every_n_steps=4, patience=2)
    trainer = fit(module, tmp_path, monitor, 10)
    assert list(monitor.trace) == [4, 8]
    # All elements are equal, so the ratio of norms is that of one element: 2 in 4 steps.
    for step, value in ((4, 8.0), (8, 6.0)):
        torch.testing.assert_close(monitor.trace[step]["drift/moving"], torch.tensor([2 / (4 * value)]))
        assert monitor.trace[step]["drift/still"].item() == 0
    assert trainer.callback_metrics["drift/still_freeze_step"] == 4
    assert trainer.callback_metrics["drift/still_frozen"] == 1
    assert trainer.callback_metrics["drift/moving_freeze_step"].isnan()
    assert trainer.callback_metrics["drift/moving_frozen"] == 0


def test_steps_are_optimizer_steps(tmp_path):
    monitor = Trace(GROUPS, every_n_steps=2)
    fit(Ramps(), tmp_path, monitor, 4, accumulate_grad_batches=3)
    assert list(monitor.trace) == [2, 4]


def test_freeze_step_is_the_first_of_the_row_by_member(tmp_path):
    module = Ramps(ensemble=2, pace=(0.5, 0.0), halts_at=5)
    monitor = Trace(GROUPS, every_n_steps=2, patience=3)
    trainer = fit(module, tmp_path, monitor, 12)
    # Checks are at 2, 4, ... The fifth step, before the check at 6, is the last that moves member 0.
    assert module.members["drift/moving_freeze_step"].tolist() == [8, 2]
    assert monitor.trace[10]["drift/moving_frozen"].tolist() == [0, 1]
    assert trainer.callback_metrics["drift/moving_freeze_step"] == 5
    assert trainer.callback_metrics["drift/moving_frozen"] == 1


def test_a_move_before_the_freeze_starts_a_new_row_and_a_later_move_keeps_the_step():
    monitor = DriftMonitor({"g": ["*"]}, eps=0.1, patience=2)
    nan = torch.full((1, 1), torch.nan)
    monitor._state = {"streak_GS": torch.zeros(1, 1, dtype=torch.long), "since_GS": nan, "freeze_step_GS": nan}
    for step, rate in enumerate([0.01, 0.5, 0.1, 0.01, 0.02, 0.9, 0.0, 0.0, 0.0]):
        monitor._state["step"] = step
        monitor._count(torch.full((1, 1), rate))
    assert monitor._state["freeze_step_GS"].item() == 3


@pytest.mark.parametrize("stop", [6, 7])
def test_resumed_run_reports_the_same(stop, tmp_path):
    def make():
        return Ramps(ensemble=2, pace=(0.5, 0.1), halts_at=9), Trace(GROUPS, every_n_steps=3, patience=2)

    whole, first, second = make(), make(), make()
    fit(*_in(whole, tmp_path), 18)
    trainer = fit(*_in(first, tmp_path), stop)
    trainer.save_checkpoint(tmp_path / "part.ckpt")
    fit(*_in(second, tmp_path), 18, ckpt_path=tmp_path / "part.ckpt")
    assert list(first[1].trace) + list(second[1].trace) == list(whole[1].trace)
    for step, measures in (first[1].trace | second[1].trace).items():
        torch.testing.assert_close(measures, whole[1].trace[step], rtol=0, atol=0, equal_nan=True)


def test_a_second_fit_begins_anew(tmp_path):
    monitor = Trace(GROUPS, every_n_steps=2, patience=2)
    fit(Ramps(pace=(0.0,)), tmp_path, monitor, 4)
    trainer = fit(module := Ramps(), tmp_path, monitor, 2)
    assert trainer.callback_metrics["drift/still_freeze_step"].isnan()
    assert torch.equal(monitor._state["before"]["a"], module.a)
    assert monitor.trace[2]["drift/moving"].item() == pytest.approx(1 / (2 * 9))


def _in(pair, tmp_path):
    return pair[0], tmp_path, pair[1]


def test_user_errors(tmp_path):
    with pytest.raises(ValueError, match="at least one group"):
        DriftMonitor({})
    with pytest.raises(ValueError, match="a name pattern in each"):
        DriftMonitor({"q": []})
    with pytest.raises(ValueError, match="`patience` must be at least 1, got 0"):
        DriftMonitor(GROUPS, patience=0)
    with pytest.raises(
        ValueError, match=r"DriftMonitor\.groups: no parameter matches 'aa'; the nearest names are: 'a'"
    ):
        fit(Ramps(), tmp_path, DriftMonitor({"x": ["aa"]}), 1)
    with pytest.raises(UserError, match="Two DriftMonitor callbacks would log 'drift/x'; keep one"):
        fit(Ramps(), tmp_path, [DriftMonitor({"x": ["a"]}), DriftMonitor({"x": ["b"]})], 1)
    module = Ramps(ensemble=2, pace=(1.0, 1.0))
    module.lone = nn.Parameter(torch.zeros(5))
    with pytest.raises(ValueError, match=r"lone of 'x' has no axis of 2 members: \(5,\)"):
        fit(module, tmp_path, DriftMonitor({"x": ["lone"]}), 1)
