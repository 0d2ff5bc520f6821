"""Collapses and recoveries of a measure are counted by their definitions."""

import math

import pytest
import torch
from conftest import QUIET
from lightning.pytorch import LightningModule, Trainer
from torch import nn
from torch.utils.data import DataLoader

from callbacks.stability_monitor import StabilityEvents, StabilityMonitor
from lightning_modules.core.intervals import wilson_interval

NAN = math.nan
TRACES = {
    # values at steps 10, 20, ...: reached_step, collapses, recoveries, escape_step, stable (settle = 2)
    "never up": ([0.1, 0.5, 0.98, 0.95, 0.2], (NAN, 0, 0, NAN, 0)),
    "up and stays": ([0.1, 0.99, 1.0, 1.0, 1.0], (20, 0, 0, 20, 1)),
    "up, too short": ([0.1, 0.5, 0.5, 1.0, 1.0], (40, 0, 0, 40, 0)),
    "up, just long enough": ([0.1, 0.5, 1.0, 1.0, 1.0], (30, 0, 0, 30, 1)),
    "dips only": ([0.99, 0.95, 0.9, 0.95, 0.9], (10, 0, 0, 10, 1)),
    "collapses at the end": ([0.5, 1.0, 1.0, 1.0, 0.1], (20, 1, 0, NAN, 0)),
    "stays down": ([1.0, 0.1, 0.1, 0.95, 0.2], (10, 1, 0, NAN, 0)),
    "recovers": ([1.0, 0.1, 1.0, 0.95, 1.0], (10, 1, 1, 30, 1)),
    "recovers at the end": ([1.0, 0.1, 0.2, 0.95, 1.0], (10, 1, 1, 50, 0)),
    "recovers twice": ([1.0, 0.1, 1.0, 0.1, 1.0], (10, 2, 2, 50, 0)),
    "unmeasured": ([NAN, 1.0, NAN, 1.0, NAN], (20, 0, 0, 20, 1)),
}
MEASURES = ("reached_step", "collapses", "recoveries", "escape_step", "stable")


def assert_measures(measures, expected_SM):
    measured_SM = torch.stack([measures[name].float() for name in MEASURES], dim=1)
    torch.testing.assert_close(measured_SM, torch.tensor(expected_SM), rtol=0, atol=0, equal_nan=True)


def test_traces_alone_and_together():
    values_SN = torch.tensor([values for values, _ in TRACES.values()])
    together = StabilityEvents(len(values_SN), 0.99, 0.9, settle=2)
    for check, values_S in enumerate(values_SN.unbind(1), 1):
        together.update(10 * check, values_S)
    assert_measures(together.measures(), [[*map(float, expected)] for _, expected in TRACES.values()])
    for values, expected in TRACES.values():
        alone = StabilityEvents(1, 0.99, 0.9, settle=2)
        for check, value in enumerate(values, 1):
            alone.update(10 * check, torch.tensor([value]))
        assert_measures(alone.measures(), [[*map(float, expected)]])


def test_before_any_check_nothing_is_stable():
    assert StabilityMonitor().state_dict() == {}
    assert_measures(StabilityEvents(1, 0.99, 0.9, settle=0).measures(), [[NAN, 0.0, 0.0, NAN, 0.0]])


class Scripted(LightningModule):
    """Validates after each step, with the accuracies of a script."""

    def __init__(self, script_NS, keeps_members=True):
        super().__init__()
        self.script_NS = torch.tensor(script_NS)
        self.ensemble = self.script_NS.shape[1]
        if keeps_members:
            self.members, self.counts, self.hits, self.intervals = {}, {}, {}, {}
        self.weight = nn.Parameter(torch.zeros(1))

    def training_step(self, batch, batch_idx):
        return self.weight.sum()

    def validation_step(self, batch, batch_idx):
        pass

    def on_validation_epoch_end(self):
        values_S = self.script_NS[self.global_step - 1]
        self.log("validation/accuracy", values_S.mean())
        if hasattr(self, "members"):
            self.members["validation/accuracy"] = values_S

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def trainer_of(tmp_path, monitor, steps, **flags):
    flags = {"num_sanity_val_steps": 0} | flags
    every = {"val_check_interval": 1, "check_val_every_n_epoch": None, "max_steps": steps}
    return Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=[monitor], **QUIET | every | flags)


def fit(module, tmp_path, monitor, steps, ckpt_path=None, **flags):
    trainer = trainer_of(tmp_path, monitor, steps, **flags)
    loader = DataLoader(torch.zeros(50, 1))
    trainer.fit(module, loader, DataLoader(torch.zeros(1, 1)), ckpt_path=ckpt_path, weights_only=True)
    return trainer


def test_each_member_has_its_measures_and_the_means_are_logged(tmp_path):
    module = Scripted([[0.1, 1.0], [1.0, 1.0], [1.0, 0.2], [1.0, 0.2]])
    trainer = fit(module, tmp_path, StabilityMonitor(settle=2), 4)
    measures = {name: module.members[f"stability/{name}"] for name in MEASURES}
    assert_measures(measures, [[2.0, 0.0, 0.0, 2.0, 1.0], [1.0, 1.0, 0.0, NAN, 0.0]])
    assert trainer.callback_metrics["stability/reached_step"] == 1.5
    assert trainer.callback_metrics["stability/stable"] == 0.5
    assert module.counts == {"stability/stable": 1}


def test_a_module_without_members_is_measured_by_its_logged_metric(tmp_path):
    module = Scripted([[0.1], [1.0], [0.2], [1.0]], keeps_members=False)
    metrics = fit(module, tmp_path, StabilityMonitor(), 4).callback_metrics
    assert_measures({name: metrics[f"stability/{name}"][None] for name in MEASURES}, [[2.0, 1.0, 1.0, 4.0, 0.0]])


def test_one_run_is_one_sample_of_a_proportion(tmp_path):
    module = Scripted([[1.0], [1.0], [1.0]])
    fit(module, tmp_path, StabilityMonitor(settle=1), 3)
    assert (module.counts, module.intervals) == ({"stability/stable": 1}, {"stability/stable": wilson_interval(1, 1)})


def test_sanity_check_and_validation_outside_fit_do_not_count(tmp_path):
    module = Scripted([[1.0], [1.0], [1.0]])
    monitor = StabilityMonitor(settle=2)
    fit(module, tmp_path, monitor, 3, num_sanity_val_steps=1)
    assert module.members["stability/reached_step"].item() == 1
    assert monitor._events.state["checks_up_S"].item() == 2
    trainer_of(tmp_path, monitor, 3).validate(module, DataLoader(torch.zeros(1, 1)), verbose=False)
    assert monitor._events.state["checks_up_S"].item() == 2


def test_resumed_run_reports_the_same(tmp_path):
    script = [[1.0, 0.1], [0.1, 1.0], [1.0, 1.0], [1.0, 0.3], [1.0, 1.0]]
    whole, part, rest = Scripted(script), Scripted(script), Scripted(script)
    fit(whole, tmp_path, StabilityMonitor(settle=2), 5)
    fit(part, tmp_path, StabilityMonitor(settle=2), 3).save_checkpoint(tmp_path / "part.ckpt")
    fit(rest, tmp_path, StabilityMonitor(settle=2), 5, ckpt_path=tmp_path / "part.ckpt")
    assert_measures(
        {name: rest.members[f"stability/{name}"] for name in MEASURES}, [[1, 1, 1, 3, 1], [2, 1, 1, 5, 0.0]]
    )
    torch.testing.assert_close(rest.members, whole.members, rtol=0, atol=0, equal_nan=True)


def test_a_second_fit_starts_anew(tmp_path):
    monitor = StabilityMonitor()
    fit(Scripted([[1.0], [0.1]]), tmp_path, monitor, 2)
    module = Scripted([[1.0], [1.0]])
    fit(module, tmp_path, monitor, 2)
    assert module.members["stability/collapses"].item() == 0


def test_user_errors(tmp_path):
    with pytest.raises(ValueError, match=r"`collapsed` \(0.9\) must not be above `reached` \(0.5\)"):
        StabilityMonitor(reached=0.5)
    with pytest.raises(ValueError, match=r"StabilityMonitor.settle must be at least 0, not -1"):
        StabilityMonitor(settle=-1)
    with pytest.raises(ValueError, match=r"StabilityMonitor.reached must be a finite number, not inf"):
        StabilityMonitor(reached=math.inf)
    StabilityMonitor(reached=0.95, collapsed=0.95)
    with pytest.raises(ValueError, match=r"no 'loss'; the nearest names are: .*'validation/accuracy'"):
        fit(Scripted([[1.0]]), tmp_path, StabilityMonitor("loss"), 1)
    with pytest.raises(ValueError, match="no 'validation/acuracy'; the nearest names are: 'validation/accuracy'"):
        fit(Scripted([[1.0]]), tmp_path, StabilityMonitor("validation/acuracy"), 1)
