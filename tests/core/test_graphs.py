"""When a step is recorded as CUDA graphs, without a GPU: the recording itself is replaced by the step."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from callbacks.hooks import eager
from lightning_modules.core import graphs
from lightning_modules.core.graphs import MOST_SHAPES, GraphedStep, is_watched, obstacle, records


@pytest.fixture
def graphed(monkeypatch):
    """Return a module, its graphed step, and the shapes that have been recorded."""
    module, shapes = nn.Linear(3, 2), []
    monkeypatch.setattr(graphs.torch.cuda, "graph_pool_handle", lambda: None)

    def record(self, step, batch):
        shapes.append(tuple(batch[0].shape))
        trained = list(step.parameters())
        return lambda *inputs: (step(*inputs)[0] * 0 + 1000 * len(trained), *step(*inputs)[1:])

    monkeypatch.setattr(GraphedStep, "_record", record)
    return module, GraphedStep(module, lambda x: (module(x).sum(), x)), shapes


def test_a_shape_is_recorded_once_and_then_replayed(graphed):
    _module, step, shapes = graphed
    for rows in (4, 4, 5, 4, 5):
        loss, x = step(torch.ones(rows, 3))
        assert (loss.item(), len(x)) == (2000, rows)
    assert shapes == [(4, 3), (5, 3)]


def test_what_a_replay_overwrites_is_not_the_loss(graphed):
    _module, step, _ = graphed
    step(torch.ones(4, 3))
    (key,) = step.recorded
    kept = torch.tensor(1.0)
    step.recorded[key] = lambda *batch: (kept, *batch)
    loss, _ = step(torch.ones(4, 3))
    kept.fill_(2.0)
    assert loss.item() == 1.0


def test_a_parameter_that_is_frozen_or_moved_leads_to_a_new_record(graphed):
    module, step, shapes = graphed
    step(torch.ones(4, 3))
    module.bias.requires_grad_(False)
    assert step(torch.ones(4, 3))[0].item() == 1000
    module.weight.data = module.weight.data.clone()
    step(torch.ones(4, 3))
    assert len(shapes) == 3


def test_further_shapes_run_without_a_record(graphed):
    _module, step, shapes = graphed
    for rows in range(1, MOST_SHAPES + 4):
        loss, _ = step(torch.ones(rows, 3))
        recorded = loss.item() == 2000
        assert recorded is (rows <= MOST_SHAPES)
    assert len(shapes) == MOST_SHAPES


def test_a_watched_step_runs_without_its_record(graphed):
    module, step, _shapes = graphed
    seen, armed = [], [False]
    handle = module.register_forward_hook(eager(lambda *args: seen.append(args), lambda: not armed[0]))
    assert not is_watched(module)
    assert step(torch.ones(4, 3))[0].item() == 2000
    armed[0] = True
    assert is_watched(module)
    assert step(torch.ones(4, 3))[0].item() != 2000
    handle.remove()
    module.register_forward_hook(eager(lambda *args: None))  # does not say when it is idle
    assert is_watched(nn.Sequential(module))


@pytest.mark.parametrize(
    "register",
    ["register_forward_pre_hook", "register_full_backward_pre_hook", "register_full_backward_hook"],
)
def test_hooks_of_every_kind_watch_a_step(register):
    module = nn.Sequential(nn.Linear(3, 2))
    assert not is_watched(module)
    getattr(module[0], register)(lambda *args: None)
    assert is_watched(module)


def test_fits_that_cannot_be_recorded_say_why():
    assert obstacle(SimpleNamespace(world_size=1, accumulate_grad_batches=1)) is None
    assert "processes" in obstacle(SimpleNamespace(world_size=2, accumulate_grad_batches=1))
    assert "accumulate_grad_batches" in obstacle(SimpleNamespace(world_size=1, accumulate_grad_batches=4))


def test_a_fit_on_a_gpu_records_where_that_is_wanted_and_possible():
    def module(kind="cuda", processes=1):
        trainer = SimpleNamespace(world_size=processes, accumulate_grad_batches=1)
        return SimpleNamespace(device=torch.device(kind), trainer=trainer)

    assert records(module(), wanted=True)
    assert not records(module(), wanted=False)
    with warnings.catch_warnings(action="error"):  # a laptop needs no warning
        assert not records(module("cpu", processes=2), wanted=True)
    with pytest.warns(UserWarning, match="model.cuda_graphs is ignored: there are several processes"):
        assert not records(module(processes=2), wanted=True)
    with pytest.warns(UserWarning, match="model.cuda_graphs is ignored: of its own"):
        assert not records(module(), True, lambda trainer: "of its own")


def test_what_else_a_step_depends_on_has_a_record_of_its_own(graphed):
    _module, step, shapes = graphed
    values = iter([1, 2, 1, 2])
    step.variant = lambda: next(values)
    for _ in range(4):
        step(torch.ones(4, 3))
    assert len(shapes) == 2
