"""The learning-rate schedules."""

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning import LightningModule
from transformers import (
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_linear_schedule_with_warmup,
)

from lightning_modules.core.schedule import warmup, warmup_cosine, warmup_linear, with_schedule


def test_the_schedule_rises_then_falls_to_zero():
    module = LightningModule()
    module.layer = torch.nn.Linear(1, 1)
    module.layer.bias.requires_grad_(False)
    module.trainer = SimpleNamespace(max_steps=20)
    made = with_schedule(module, partial(torch.optim.SGD, lr=1.0), warmup_steps=4)
    rates = []
    for _ in range(20):
        rates.append(made["lr_scheduler"]["scheduler"].get_last_lr()[0])
        made["optimizer"].step()
        made["lr_scheduler"]["scheduler"].step()
    assert rates[:5] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True)
    assert made["lr_scheduler"]["scheduler"].get_last_lr()[0] == pytest.approx(0.0, abs=1e-9)
    assert [p.requires_grad for g in made["optimizer"].param_groups for p in g["params"]] == [True]
    module.trainer = SimpleNamespace(max_steps=-1)
    with pytest.raises(ValueError, match=r"trainer.max_steps must be set"):
        with_schedule(module, torch.optim.SGD, 4)


def test_the_factors_are_those_of_transformers():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    cosine = get_cosine_schedule_with_warmup(optimizer, 200, 1900).lr_lambdas[0]
    linear = get_linear_schedule_with_warmup(optimizer, 200, 1900).lr_lambdas[0]
    constant = get_constant_schedule_with_warmup(optimizer, 50).lr_lambdas[0]
    for step in range(1901):
        assert warmup_cosine(step, 200, 1900) == cosine(step)
        assert warmup_linear(step, 200, 1900) == linear(step)
        assert warmup(step, 50) == constant(step)
