"""The phases of a step: which there are, when they are measured, and that a step is as long as its phases."""

from functools import partial

import pytest
import torch
from conftest import QUIET
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from toy_logger import Kept

from callbacks import step_phases
from callbacks.step_phases import StepPhases
from datamodules.errors import UserError
from lightning_modules.core.graphs import is_watched
from lightning_modules.telepathy.bridges import PerceiverBridge

PERCEIVER = partial(PerceiverBridge, soft_tokens=30, tokens_per_query=3, span=30, width=32)
PARTS = {f"phases/{name}_ms" for name in ("source", "bridge", "target", "losses", "backward", "optimizer")}


class Clocked(LightningModule):
    """Takes 2 s for its forward, 3 s for its backward and 4 s for its optimizer, by a clock of its own."""

    now = 0.0

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(1, 1)

    def training_step(self, batch, batch_idx):
        Clocked.now += 2
        return self.layer(torch.ones(1)).sum()

    def backward(self, loss):
        Clocked.now += 3
        loss.backward()

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        Clocked.now += 4

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def run(folder, *callbacks, accumulate=1, steps=7):
    logger = Kept()
    options = QUIET | {"logger": logger, "accelerator": "cpu", "default_root_dir": folder, "max_steps": steps}
    trainer = Trainer(**options, callbacks=list(callbacks), accumulate_grad_batches=accumulate, log_every_n_steps=3)
    trainer.fit(Clocked(), torch.utils.data.DataLoader(torch.zeros(40, 1)))
    rows = [row for row in logger.rows if row != "saved" and "phases/backward_ms" in row[1]]
    return rows, {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize(("every", "accumulate", "steps"), [(None, 1, [2, 5]), (2, 1, [1, 3, 5]), (2, 2, [1, 3, 5])])
def test_phases_are_logged_every_n_steps_and_their_means_are_kept(tmp_path, monkeypatch, every, accumulate, steps):
    monkeypatch.setattr(step_phases.time, "perf_counter", lambda: Clocked.now)
    rows, kept = run(tmp_path, StepPhases(every), accumulate=accumulate)
    assert [step for step, _ in rows] == steps
    expected = {"phases/forward_ms": 2000.0, "phases/backward_ms": 3000.0, "phases/optimizer_ms": 4000.0}
    assert all(row == expected for _, row in rows)
    assert {name: value for name, value in kept.items() if name in expected} == expected


class Slow(Callback):
    """Takes 50 s at the end of a batch, as an evaluation does."""

    def on_train_batch_end(self, *arguments):
        Clocked.now += 50


def test_what_other_callbacks_do_after_a_step_is_no_phase_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(step_phases.time, "perf_counter", lambda: Clocked.now)
    rows, kept = run(tmp_path, Slow(), StepPhases(2))
    assert [row["phases/optimizer_ms"] for _, row in rows] == [4000.0] * 3
    assert kept["phases/optimizer_ms"] == 4000.0


def test_a_bridge_has_its_parts_and_leaves_other_steps_unwatched(telepathy, fit):
    module, seen = telepathy(PERCEIVER, objectives={"lm": 1.0, "kl_text": 1.0}), []  # kl_text calls the target again

    class Watched(StepPhases):
        def on_before_backward(self, trainer, pl_module, loss):
            seen.append(is_watched(pl_module))
            super().on_before_backward(trainer, pl_module, loss)

    trainer = fit(module, 5, callbacks=[Watched(2)])
    assert seen == [False, True, False, True, False]
    found = {name: value.item() for name, value in trainer.callback_metrics.items() if name in PARTS}
    assert set(found) == PARTS
    assert all(value > 0 for value in found.values())
    assert not is_watched(module)  # the hooks came off


def test_a_fit_without_a_measured_step_keeps_nothing(tmp_path):
    rows, kept = run(tmp_path, StepPhases(100), steps=2)
    assert not rows
    assert not [name for name in kept if name.startswith("phases/")]


def test_wrong_numbers_and_a_second_callback_are_refused(tmp_path):
    with pytest.raises(UserError, match="`every_n_steps` must be at least 1"):
        StepPhases(0)
    with pytest.raises(UserError, match="Two StepPhases"):
        run(tmp_path, StepPhases(), StepPhases(2))
