"""Whether the optimizer's state in a checkpoint is one that the optimizer of a run can go on with."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from callbacks.parameter_freeze import ParameterFreeze
from cli.checkpoint_settings import class_of
from datamodules.errors import UserError
from lightning_modules.core.checkpoints import saved_config
from lightning_modules.core.contracts import connected
from lightning_modules.core.sites import match_parameters

MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg")  # of the shape of their parameter
OF_SCHEDULES = {"params", "param_names", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr"}
OF_MACHINES = {"capturable", "differentiable", "foreach", "fused", "maximize"}  # change no key of the state
NO_ORDINARY_STEP = {"LBFGS", "SparseAdam"}  # need a closure, or sparse gradients

Group = Mapping[str, Any]


def check_optimizer(
    content: Mapping[str, Any], model: LightningModule, trainer: Trainer, kind: str | None, option: str
) -> None:
    """Check that a checkpoint holds the state of the optimizer that the config names.

    Raises:
        UserError: It is of another class, of other parameters, or damaged.
    """
    states, groups = content["optimizer_states"], _groups(content["optimizer_states"])
    if groups is None or (kind and not groups):
        raise UserError(f"{option}: the checkpoint holds no state of an optimizer under 'optimizer_states'")
    made = class_of(saved_config(content), "model.optimizer")
    optimizer = _of_torch(kind)
    if kind and (made != kind if made else optimizer and _is_other_kind(groups[0], optimizer)):
        advice = f"set model.optimizer to {made or 'the one of its run'}"
        whose = made or f"another optimizer than {kind}"
        raise UserError(f"{option}: the checkpoint holds the state of {whose}, and model.optimizer is {kind}: {advice}")
    if optimizer and kind not in NO_ORDINARY_STEP:
        for state in states:
            if fault := _fault(state, optimizer):
                raise UserError(f"{option}: the state of {kind} in the checkpoint is damaged: {fault}")
    saved, here = sum(len(group["params"]) for group in groups), len(list(model.parameters()))
    if saved > here:
        raise UserError(f"{option}: the optimizer in the checkpoint has {saved} parameters, and this run has {here}")
    if type(model).__module__.startswith("lightning_modules."):  # with the optimizer of `with_schedule`
        counts = len(states), len(groups), len(content["lr_schedulers"])
        if counts != (1, 1, 1):
            found = "{} optimizers, {} groups of parameters and {} schedules".format(*counts)
            raise UserError(f"{option}: the checkpoint holds {found}, and {type(model).__name__} has one of each")
        _check_moments(groups[0]["params"], states[0]["state"], _trained(model, trainer), option)


def _groups(states: list[Any]) -> list[Group] | None:
    """Return the groups of all optimizers; None if a state is not what `Optimizer.state_dict` returns."""
    found: list[Group] = []
    for state in states:
        groups = state.get("param_groups") if isinstance(state, Mapping) else None
        entries = state.get("state") if isinstance(state, Mapping) else None
        if not isinstance(groups, list) or not isinstance(entries, Mapping):
            return None
        whole = all(isinstance(group, Mapping) and isinstance(group.get("params"), list) for group in groups)
        if not whole or not all(isinstance(entry, Mapping) for entry in entries.values()):
            return None
        found += groups
    return found


def _of_torch(kind: str | None) -> type[Optimizer] | None:
    found = getattr(torch.optim, kind or "", None)
    return found if isinstance(found, type) and issubclass(found, Optimizer) else None


def _is_other_kind(group: Group, optimizer: type[Optimizer]) -> bool:
    """Return whether a group has settings that an optimizer lacks, and lacks others that the optimizer has."""
    known, saved = _defaults(optimizer).keys(), group.keys() - OF_SCHEDULES
    return bool(saved - known) and bool(known - saved)  # versions of torch may differ in one direction


def _defaults(optimizer: type[Optimizer]) -> dict[str, Any]:
    make: Any = optimizer  # the signature of the base class needs defaults
    defaults: dict[str, Any] = make([torch.nn.Parameter(torch.zeros(1, 1))]).defaults
    return defaults


def _fault(state: Mapping[str, Any], optimizer: type[Optimizer]) -> str | None:
    """Return what is wrong with a state, compared with that of a small optimizer of the same settings after a step."""
    defaults = _defaults(optimizer)
    needed = [key for key, value in defaults.items() if isinstance(value, float | tuple)]
    settings = inspect.signature(optimizer).parameters.keys() & defaults.keys() - OF_MACHINES
    for group in state["param_groups"]:
        if missing := [key for key in needed if key not in group]:
            return f"{missing[0]} is missing"
        if tensors := [key for key in group if isinstance(group[key], Tensor) and group[key].numel() != 1]:
            return f"{tensors[0]} is a tensor of {group[tensors[0]].numel()} values"
        parameter = torch.nn.Parameter(torch.zeros(1, 1))
        parameter.grad = torch.zeros(1, 1)
        make: Any = optimizer
        try:
            made = make([parameter], **{key: group[key] for key in settings & group.keys()})
            made.step()
        except Exception as error:  # each setting has its own way to fail
            return str(error)
        for index in group["params"]:
            if (entry := state["state"].get(index)) and (fault := _fault_of_entry(entry, made.state[parameter])):
                return fault
    return None


def _fault_of_entry(entry: Mapping[str, Any], form: Mapping[str, Any]) -> str | None:
    for key, value in form.items():
        if key not in entry:
            return f"{key} of a parameter is missing"
        saved = entry[key]
        if not isinstance(value, Tensor):
            continue  # None, before a first momentum
        if value.dim() > 0 and not isinstance(saved, Tensor):
            return f"{key} of a parameter is {saved!r}"
        if value.dim() == 0:  # a count, which older versions of torch kept as a number
            number = saved.item() if isinstance(saved, Tensor) and saved.numel() == 1 else saved
            if not isinstance(number, int | float) or not math.isfinite(number) or number < 0:
                return f"{key} of a parameter is {saved!r}"
    return None


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
