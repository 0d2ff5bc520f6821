"""Rounded parameters are numbers of their precision after every step, and lose updates that are too small."""

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import nn
from torch.utils.data import DataLoader

from callbacks.parameter_rounding import ParameterRounding
from datamodules.errors import UserError


class Ascent(LightningModule):
    """Adds `rate` to every parameter in each step."""

    def __init__(self, rate):
        super().__init__()
        self.rate = rate
        self.own, self.other = (nn.ParameterList([torch.full((3,), 1 + 2.0**-9)]) for _ in range(2))

    def training_step(self, batch, batch_idx):
        return -sum(parameter.sum() for parameter in self.parameters())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.rate)


class Seen(Callback):
    def __init__(self):
        self.values, self.ends = [], []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.ends.append(pl_module.own[0][0].item())

    def on_train_batch_start(self, trainer, pl_module, *_):
        self.values.append(pl_module.own[0][0].item())


def fit(rate, *callbacks, steps=4, module=None):
    module = module or Ascent(rate)
    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = Trainer(max_steps=steps, enable_model_summary=False, callbacks=list(callbacks), **options)
    trainer.fit(module, DataLoader(torch.zeros(8), batch_size=1))
    return module


def test_small_updates_are_lost_and_large_ones_are_not():
    seen = Seen()
    module = fit(2.0**-9, ParameterRounding(), seen)  # neighbours of 1 in bf16 are 2^-7 away
    assert seen.values == [1.0] * 4
    assert torch.equal(module.own[0], torch.ones(3))
    module = fit(2.0**-7, ParameterRounding())
    assert torch.equal(module.own[0], torch.full((3,), 1 + 2.0**-5))
    assert torch.equal(fit(2.0**-9).own[0], torch.full((3,), 1 + 5 * 2.0**-9))


def test_fp16_has_other_neighbours():
    assert torch.equal(fit(2.0**-9, ParameterRounding("fp16")).own[0], torch.full((3,), 1 + 5 * 2.0**-9))
    assert torch.equal(fit(2.0**-12, ParameterRounding("fp16")).own[0], torch.full((3,), 1 + 2.0**-9))


def test_only_matched_parameters_are_rounded():
    module = fit(2.0**-9, ParameterRounding(parameters=["own.*"]))
    assert torch.equal(module.own[0], torch.ones(3))
    assert torch.equal(module.other[0], torch.full((3,), 1 + 5 * 2.0**-9))


def test_all_callbacks_see_rounded_parameters_whatever_their_order():
    seen, average = Seen(), EMAWeightAveraging(decay=0.5)
    fit(2.0**-9, seen, average, ParameterRounding())
    assert seen.ends == [1.0] * 4
    module = fit(2.0**-9, EMAWeightAveraging(decay=0.5), ParameterRounding())
    assert torch.equal(module.own[0], torch.ones(3))


def test_frozen_parameters_keep_every_bit_unless_they_are_named():
    def frozen(*callbacks):
        module = Ascent(2.0**-9)
        module.other.requires_grad_(False)
        return fit(2.0**-9, *callbacks, module=module)

    module = frozen(ParameterRounding())
    assert torch.equal(module.own[0], torch.ones(3))
    assert torch.equal(module.other[0], torch.full((3,), 1 + 2.0**-9))
    assert torch.equal(frozen(ParameterRounding(parameters=["other.*"])).other[0], torch.ones(3))


def test_mistakes_are_sentences():
    with pytest.raises(UserError, match=r"ParameterRounding\.parameters is empty"):
        ParameterRounding(parameters=[])
    with pytest.raises(UserError, match="nothing"):
        fit(0.1, ParameterRounding(parameters=["nothing.*"]))
