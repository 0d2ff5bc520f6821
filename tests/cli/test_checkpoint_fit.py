"""Parameters and progress of a checkpoint are compared with those of a model and a trainer."""

import copy

import pytest
import torch
from conftest import QUIET
from lightning import LightningModule, Trainer
from torch import nn

from cli.checkpoint_fit import check_loops, misfit_of_parameters
from datamodules.errors import UserError


class Mine(LightningModule):
    def __init__(self, strict=True):
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.register_buffer("count", torch.zeros(1, dtype=torch.long))
        self.strict_loading = strict


def hooked(name):
    """Return a module of the user's that has a hook."""
    return type("Hooked", (Mine,), {name: lambda self, *_: None})()


def misfit(model=None, average=None, without=(), **changes):
    state = {name: value for name, value in Mine().state_dict().items() if name not in without}
    state |= {name.replace("_", "."): value for name, value in changes.items()}
    averaged = {"current_model_state": average} if average is not None else {}
    return misfit_of_parameters({"state_dict": state} | averaged, model or Mine())


def test_parameters_that_fit_in_name_shape_and_kind():
    assert misfit() is misfit(layer_weight=torch.zeros(3, 2).half()) is misfit(average=Mine().state_dict()) is None
    assert misfit(layer_weight=torch.zeros(2, 3)) == "layer.weight is [2, 3] there and [3, 2] in the model"
    assert misfit(count=torch.zeros(1)) == "count is of torch.float32 there and of torch.int64 in the model"
    assert misfit(count=torch.zeros(1).cfloat()) == "count is of torch.complex64 there and of torch.int64 in the model"
    assert misfit(average={}) == "it lacks the model's parameter count"
    assert misfit(without=["layer.bias"]) == "it lacks the model's parameter layer.bias"
    assert misfit(more=torch.zeros(1)) == "it has a parameter that the model does not have: more"
    assert misfit(average={"layer.bias": torch.zeros(3)}) == "it lacks the model's parameter count"
    others = misfit(without=["layer.weight", "layer.bias", "count"], other=torch.zeros(1))
    assert others == "it has no parameter of this Mine, its first one is other"


def test_a_module_may_load_a_part_or_change_the_checkpoint_itself():
    assert misfit(Mine(strict=False), without=["layer.bias"], more=torch.zeros(1)) is None
    assert misfit(Mine(strict=False), layer_bias=torch.zeros(4)) == "layer.bias is [4] there and [3] in the model"
    assert misfit(Mine(strict=False), without=["layer.weight", "layer.bias", "count"], other=torch.zeros(1)) is None
    for name in ("configure_model", "on_load_checkpoint", "setup"):
        assert misfit(hooked(name), without=["layer.bias"], layer_weight=torch.zeros(9)) is None
    own = type("Own", (Mine,), {"__module__": "lightning_modules.line"})
    assert misfit(own(strict=False), without=["layer.bias"]) == "it lacks the model's parameter layer.bias"


def test_parameters_that_are_one_in_the_model_are_one_in_the_checkpoint():
    for strict in (True, False):
        model = Mine(strict)
        model.again = model.layer
        found = misfit(model, **{"again_weight": Mine().layer.weight, "again_bias": Mine().layer.bias})
        said = "layer.weight and again.weight are one parameter in the model, and differ there"
        assert found == (said if strict else None)


@pytest.fixture
def trainer():
    return Trainer(accelerator="cpu", **QUIET)


LOOPS = {"fit": "fit_loop", "validate": "validate_loop", "test": "test_loop", "predict": "predict_loop"}


@pytest.mark.parametrize("command", LOOPS)
def test_progress_of_the_form_of_the_trainer(trainer, command):
    name = LOOPS[command]
    whole = {name: getattr(trainer, name).state_dict()}
    check_loops({}, command, trainer, "x")  # weights alone
    check_loops({"loops": whole}, command, trainer, "x")
    key = next(key for key in whole[name] if key.endswith("progress"))
    older = {name: {other: value for other, value in whole[name].items() if other != key} | {"another": "version"}}
    check_loops({"loops": older}, command, trainer, "x")
    for change, said in (
        (lambda progress: progress["total"].pop("ready"), f"{name}.{key}.total.ready is missing"),
        (lambda progress: progress["current"].update(ready=-1), f"{name}.{key}.current.ready is -1"),
        (lambda progress: progress["current"].update(completed="1"), f"{name}.{key}.current.completed is '1'"),
        (lambda progress: progress.update(total=3), f"{name}.{key}.total is 3"),
    ):
        damaged = copy.deepcopy(whole)
        change(damaged[name][key])
        with pytest.raises(UserError, match=rf"^x: the progress of the run in the checkpoint is damaged: {said}$"):
            check_loops({"loops": damaged}, command, trainer, "x")
    with pytest.raises(UserError, match=f"it lacks loops.{name}"):
        check_loops({"loops": {name: 3}}, command, trainer, "x")
