"""Batches for CUDA graphs: padding changes no loss and no gradient, and a batch is the same after taking it apart."""

from functools import partial

import pytest
import torch

from lightning_modules.core.graphs import GraphedStep, is_watched
from lightning_modules.telepathy import training
from lightning_modules.telepathy.bridges import PerceiverBridge, TokenBridge
from lightning_modules.telepathy.flow import FlowBridge
from lightning_modules.telepathy.layout import Packing
from lightning_modules.telepathy.recording import MULTIPLE, RECORDED, padded, tensors, with_tensors

PERCEIVER = partial(PerceiverBridge, soft_tokens=30, tokens_per_query=3, span=30, width=32)


@pytest.fixture
def module(telepathy):
    made = telepathy(PERCEIVER, objectives=dict.fromkeys(RECORDED, 0.5))
    made.trainer = type("T", (), {"world_size": 1, "accumulate_grad_batches": 1, "datamodule": None})
    return made


def gradients(module, batch):
    loss, losses = module.losses(batch)
    module.zero_grad()
    loss.backward()
    trained = {name: x.grad.clone() for name, x in module.named_parameters() if x.grad is not None}
    return {name: value.detach() for name, value in losses.items()} | trained


@pytest.mark.parametrize("size", [1, 5, 16])
def test_padding_changes_no_loss_and_no_gradient(module, problems, size):
    batch = module.collate(problems[:size], training=True)
    wide = padded(batch, None, None)
    assert wide["soft"].tokens_BT.shape[1] % MULTIPLE == 0
    assert wide["source"].shape[1] > batch["source"].shape[1]
    assert len(wide["soft"].labels_N) > len(batch["soft"].labels_N)
    ours, expected = gradients(module, wide), gradients(module, batch)
    assert set(RECORDED) < set(expected)
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, rtol=0, atol=1e-5 * value.abs().max().item() + 1e-6)


def test_batches_of_near_lengths_get_one_shape(module, problems):
    shapes = {
        tuple(tuple(x.shape) for x in tensors(padded(module.collate(problems[start : start + 4], True), None, None)))
        for start in range(0, 16, 4)
    }
    assert len(shapes) == 1


def test_padding_ends_at_the_positions_of_a_model(module, problems):
    batch = module.collate(problems, training=True)
    source, target = batch["source"].shape[1] + 1, batch["soft"].tokens_BT.shape[1] + 2
    wide = padded(batch, source, target)
    assert (wide["source"].shape[1], wide["soft"].tokens_BT.shape[1]) == (source, target)


def test_a_batch_is_put_together_again(module, problems):
    batch = module.collate(problems, training=True)
    parts = tensors(batch)
    again = with_tensors(batch, [x.clone() for x in parts])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(tensors(again), parts, strict=True))
    assert list(again) == list(batch)
    assert again["soft"].padding == batch["soft"].padding
    assert sum(isinstance(x, Packing) for x in again.values()) == 1
    other = with_tensors(batch, [x + 1 if x.dtype == torch.long else x for x in parts])
    assert torch.equal(other["soft"].labels_N, batch["soft"].labels_N + 1)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"objectives": {"lm": 1.0, "kl_text": 1.0}}, "model.objectives has kl_text"),
        ({"text_prefix": 2}, "model.text_prefix"),
        ({"bottleneck": "fsq"}, "model.bottleneck"),
        ({"bridge": TokenBridge}, "soft tokens depends on the question"),
        ({"bridge": partial(FlowBridge, width=32, soft_tokens=8), "objectives": {"lm": 1.0}}, "draws noise"),
    ],
)
def test_what_cannot_be_recorded_is_told(telepathy, module, options, reason):
    assert module.why_not_recorded(module.trainer) is None
    other = telepathy(**{"bridge": PERCEIVER} | options)
    assert reason in other.why_not_recorded(module.trainer)


def test_a_source_that_reads_padding_cannot_be_recorded(module, monkeypatch):
    monkeypatch.setattr(module.source.model, "reads_padding", True)
    assert module.why_not_recorded(module.trainer) == "the source reads padding"


def test_batches_of_many_sizes_cannot_be_recorded(module):
    module.trainer.datamodule = type("D", (), {"max_tokens": 2048})
    assert "data.max_tokens" in module.why_not_recorded(module.trainer)


@pytest.mark.parametrize("layer", [1, 4])
def test_the_hooks_of_transformers_do_not_watch_a_step(telepathy, layer):
    module = telepathy(PERCEIVER, source_layer=layer)
    assert module.source.model.count == 4
    assert not is_watched(module)


def test_on_a_cpu_the_option_changes_nothing(telepathy, fit):
    losses = [fit(telepathy(PERCEIVER, cuda_graphs=graphs), 3).callback_metrics["train/loss"] for graphs in (0, 1)]
    assert torch.equal(*losses)


def test_a_recorded_fit_is_the_fit(telepathy, fit, monkeypatch):
    objectives = {"lm": 1.0, "batch_diversity": 0.1, "contrastive": 0.1}
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: None)
    found = []
    for recorded in (False, True):
        shapes = []
        monkeypatch.setattr(
            GraphedStep, "_record", lambda self, step, batch, shapes=shapes: shapes.append(batch) or step
        )
        monkeypatch.setattr(training, "records", lambda *args, recorded=recorded: recorded)
        module = telepathy(PERCEIVER, objectives=objectives)
        found.append({name: value.item() for name, value in fit(module, 4).callback_metrics.items()})
        assert bool(shapes) is recorded
    assert set(found[0]) == {"train/loss", *(f"train/{name}" for name in objectives)}
    assert found[1] == pytest.approx(found[0], rel=1e-3)
