"""Whether the content of a checkpoint fits a model and a trainer that have been built, before it is restored."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from callbacks.parameter_freeze import ParameterFreeze
from cli.checkpoint_settings import class_of
from datamodules.errors import UserError
from lightning_modules.core.checkpoints import AVERAGED
from lightning_modules.core.contracts import connected
from lightning_modules.core.sites import match_parameters

# Hooks with which a module of the user's may change its parameters or the checkpoint before it is restored
HOOKS = ("configure_model", "on_load_checkpoint", "setup")
KNOWN = ("lightning_modules.", "lightning.")  # code whose hooks do not
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg")  # of the shape of their parameter
OF_SCHEDULES = {"params", "param_names", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
LOOPS = {"fit": "fit_loop", "validate": "validate_loop", "test": "test_loop", "predict": "predict_loop"}


def misfit_of_parameters(content: Mapping[str, Any], model: LightningModule) -> str | None:
    """Return how a checkpoint's parameters differ from the model's in name, shape or type; None if they fit.

    A module of the user's with hooks of its own is left to Lightning.
    """
    if not all(getattr(type(model), hook).__module__.startswith(KNOWN) for hook in HOOKS):
        return None
    expected = model.state_dict()
    by_name = model.strict_loading or type(model).__module__.startswith(KNOWN)
    for state in (content[key] for key in ("state_dict", AVERAGED) if key in content):
        if by_name and state and expected and not state.keys() & expected.keys():
            return f"it has no parameter of this {type(model).__name__}, its first one is {next(iter(state))}"
        if fault := _misfit_of_state(state, expected, by_name):
            return fault
    return None


def _misfit_of_state(state: Mapping[str, Any], expected: Mapping[str, Any], by_name: bool) -> str | None:
    if by_name and (missing := [name for name in expected if name not in state]):
        return f"it lacks the model's parameter {missing[0]}"
    if by_name and (unknown := [name for name in state if name not in expected]):
        return f"it has a parameter that the model does not have: {unknown[0]}"
    for name, value in expected.items():
        saved = state.get(name)
        if not (isinstance(value, Tensor) and isinstance(saved, Tensor)):
            continue  # extra state
        if saved.shape != value.shape:
            return f"{name} is {list(saved.shape)} there and {list(value.shape)} in the model"
        if (saved.is_floating_point(), saved.is_complex()) != (value.is_floating_point(), value.is_complex()):
            return f"{name} is of {saved.dtype} there and of {value.dtype} in the model"
    return None


def check_loops(content: Mapping[str, Any], command: str, trainer: Trainer, option: str) -> None:
    """Check that the progress in a checkpoint has the form of the trainer's.

    Raises:
        UserError: It has another form.
    """
    if "loops" not in content:
        return
    name = LOOPS[command]
    form = getattr(trainer, name).state_dict()
    saved = content["loops"].get(name)
    if not isinstance(saved, Mapping):
        raise UserError(f"{option}: the checkpoint has no progress of a run, it lacks loops.{name}")
    for key in saved.keys() & form.keys():  # Lightning itself passes over what older versions did not write
        if misfit := _misfit(saved[key], form[key], f"{name}.{key}"):
            raise UserError(f"{option}: the progress of the run in the checkpoint is damaged: {misfit}")


def _misfit(saved: Any, form: Any, name: str) -> str | None:
    if isinstance(form, Mapping):
        if not isinstance(saved, Mapping):
            return f"{name} is {saved!r}"
        missing = [f"{name}.{key} is missing" for key in form if key not in saved]
        faults = (_misfit(saved[key], form[key], f"{name}.{key}") for key in form if key in saved)
        return next(iter(missing), None) or next(filter(None, faults), None)
    if isinstance(form, int) and (not isinstance(saved, int) or saved < 0):
        return f"{name} is {saved!r}"
    return None


def check_optimizer(
    content: Mapping[str, Any], model: LightningModule, trainer: Trainer, kind: str | None, option: str
) -> None:
    """Check that a checkpoint holds the state of the optimizer that the config names.

    Raises:
        UserError: It is of another class, or of other parameters.
    """
    states = content["optimizer_states"]
    for state in states:
        groups = state.get("param_groups") if isinstance(state, Mapping) else None
        whole = isinstance(groups, list) and all(isinstance(group, Mapping) and "params" in group for group in groups)
        if not whole or not isinstance(state.get("state"), Mapping):
            raise UserError(f"{option}: the checkpoint holds no state of an optimizer under 'optimizer_states'")
    groups = [group for state in states for group in state["param_groups"]]
    made = class_of(content.get("config") or {}, "model.optimizer")
    if kind and (made != kind if made else _is_other_kind(groups, kind)):
        advice = f"set model.optimizer to {made or 'the one of its run'}"
        whose = made or f"another optimizer than {kind}"
        raise UserError(f"{option}: the checkpoint holds the state of {whose}, and model.optimizer is {kind}: {advice}")
    if type(model).__module__.startswith("lightning_modules."):  # with the optimizer of `with_schedule`
        counts = len(states), len(groups), len(content["lr_schedulers"])
        if counts != (1, 1, 1):
            found = "{} optimizers, {} groups of parameters and {} schedules".format(*counts)
            raise UserError(f"{option}: the checkpoint holds {found}, and {type(model).__name__} has one of each")
        _check_moments(groups[0]["params"], states[0]["state"], _trained(model, trainer), option)


def _is_other_kind(groups: list[Mapping[str, Any]], kind: str) -> bool:
    """Return whether groups have settings that an optimizer of torch lacks, and lack others that it has."""
    optimizer = getattr(torch.optim, kind, None)
    if not groups or not isinstance(optimizer, type):
        return False
    known = optimizer([torch.nn.Parameter(torch.zeros(1, 1))]).defaults.keys()
    saved = groups[0].keys() - OF_SCHEDULES
    return bool(saved - known) and bool(known - saved)  # versions of torch may differ in one direction


def _trained(model: LightningModule, trainer: Trainer) -> dict[str, Tensor]:
    """Return the parameters that the optimizer will have, name -> value."""
    frozen: set[str] = set()
    for callback in connected(trainer).callbacks:
        if isinstance(callback, ParameterFreeze) and callback.at_step == 0:
            frozen |= match_parameters(model, callback.parameters).keys()
    return {name: value for name, value in model.named_parameters() if value.requires_grad and name not in frozen}


def _check_moments(
    params: list[int], state: Mapping[int, Mapping[str, Any]], trained: dict[str, Tensor], option: str
) -> None:
    if len(params) != len(trained):
        counts = f"{len(params)} parameters there and {len(trained)} here"
        raise UserError(
            f"{option}: the optimizer in the checkpoint has other parameters than that of this run: {counts}"
        )
    for index, (name, parameter) in zip(params, trained.items(), strict=True):
        for key, value in state.get(index, {}).items():
            if key in MOMENTS and isinstance(value, Tensor) and value.shape != parameter.shape:
                shapes = f"{list(value.shape)} there and {list(parameter.shape)} in the model"
                raise UserError(f"{option}: the optimizer's {key} of {name} does not fit the config: {shapes}")
