"""Logits are made for every labelled position, hooks on the unembedding act, and only a fit begins penalties."""

import math
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import Trainer

from datamodules.batch import IGNORE
from datamodules.needle_gym import NeedleGym
from lightning_modules.groundthink import GroundThink
from lightning_modules.groundthink.penalties import Penalty

SIZES = {"vocab_size": 16, "seq_len": 16, "width": 16, "window": 4, "seed": 0}


@pytest.mark.parametrize("labelled", range(18))
def test_no_label_is_left_out_of_the_loss(labelled):
    module = GroundThink(**SIZES)
    tokens_BT = torch.randint(16, (2, 16))
    labels_BT = tokens_BT.where(torch.randperm(32).view(2, 16) < labelled, IGNORE)
    expected_S, _ = module.losses(tokens_BT, labels_BT)
    module._trainer = SimpleNamespace(training=True)
    module.on_before_batch_transfer({"tokens": tokens_BT, "labels": labels_BT}, 0)
    assert labelled <= module.step_variant() <= max(1, 2 * labelled - 1)
    torch.testing.assert_close(module.losses(tokens_BT, labels_BT)[0], expected_S)


def test_a_hook_on_the_unembedding_acts_on_the_loss():
    module = GroundThink(**SIZES)
    module.network.unembed.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    tokens_BT = torch.randint(16, (2, 16))
    assert module.losses(tokens_BT, tokens_BT)[0].item() == pytest.approx(math.log(16))


def test_a_validation_without_training_begins_nothing():
    module = GroundThink(**SIZES, beta_sparsity=Penalty(1.0, from_accuracy=0.0))
    data = NeedleGym(needles=2, seq_len=16, vocab_size=16, batch_size=4, validation_size=8)
    Trainer(accelerator="cpu", logger=False, enable_progress_bar=False).validate(module, data, verbose=False)
    assert module.onsets.begun() == {"beta_sparsity": [False]}
