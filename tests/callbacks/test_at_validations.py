"""A callback that measures at validations does so after every n steps, and where an uninterrupted run does."""

import pytest
import torch
from conftest import QUIET
from lightning import Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from toy_fit import SIZES, StopAt, Stopped, fit

from callbacks.at_validations import AtValidations
from datamodules import ModularArithmetic
from datamodules.errors import UserError
from lightning_modules.separability import Separability


class Notes(AtValidations):
    """Notes the steps at which it measures, and a weight."""

    def __init__(self, every_n_steps):
        super().__init__(every_n_steps)
        self.seen, self.weights = [], []

    def at_validation(self, trainer, pl_module):
        self.seen.append(trainer.global_step)
        self.weights.append(pl_module.network.unembed.weight.detach().clone())


@pytest.mark.parametrize(("every", "seen"), [(0, []), (4, [4, 8, 12, 16, 20]), (6, [8, 12, 20]), (40, [])])
def test_it_measures_at_the_first_validation_after_n_steps(tmp_path, every, seen):
    notes = Notes(every)
    fit(tmp_path, 23, [notes])  # a validation after each four steps
    assert notes.seen == seen


@pytest.mark.parametrize("every", [0, 40])
def test_validate_always_measures(tmp_path, every):
    notes = Notes(every)
    trainer = Trainer(accelerator="cpu", default_root_dir=tmp_path, callbacks=[notes, EMAWeightAveraging()], **QUIET)
    trainer.validate(Separability(**SIZES), datamodule=ModularArithmetic(p=13, batch_size=12), verbose=False)
    assert notes.seen == [0]


@pytest.mark.parametrize(
    ("stop", "before", "after"), [(6, [], [8, 12, 20]), (11, [8], [8, 12, 20]), (18, [8, 12], [20])]
)
def test_a_resumed_run_measures_where_the_uninterrupted_run_does(tmp_path, stop, before, after):
    cut, resumed = Notes(6), Notes(6)
    with pytest.raises(Stopped):
        fit(tmp_path / "cut", 21, [cut, StopAt("on_train_batch_start", stop)])
    fit(tmp_path / "on", 21, [resumed], ckpt_path=tmp_path / "cut" / "checkpoints" / "last.ckpt")
    assert (cut.seen, resumed.seen) == (before, after)  # the checkpoint is of the time before a validation


def test_it_measures_the_average_of_the_weights(tmp_path):
    notes = Notes(4)
    module = fit(tmp_path, 4, [notes, EMAWeightAveraging(decay=1.0)])  # the weights after the first step
    first = fit(tmp_path / "one", 1, limit_val_batches=0)
    assert torch.equal(notes.weights[0], first.network.unembed.weight)
    assert torch.equal(module.network.unembed.weight, notes.weights[0])  # the average is what a fit leaves


def test_a_negative_number_of_steps_is_refused():
    with pytest.raises(UserError, match="every_n_steps must be at least 0"):
        Notes(-1)
