"""The state of an optimizer in a checkpoint is compared with that of the run that goes on with it."""

import copy

import pytest
import torch
from conftest import QUIET
from lightning import Trainer
from toy_fit import SIZES, fit, held

from callbacks import ParameterFreeze
from cli.checkpoint_optimizer import check_optimizer
from datamodules.errors import UserError
from lightning_modules.separability import Separability


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Return the checkpoint of a run of two steps with AdamW."""
    folder = tmp_path_factory.mktemp("whole")
    fit(folder, 2)
    return held(folder)


def check(content, kind="AdamW", make=Separability, callbacks=(), **sizes):
    trainer = Trainer(accelerator="cpu", callbacks=list(callbacks), **QUIET)
    check_optimizer(content, make(**SIZES | sizes), trainer, kind, "--ckpt_path")


def changed(content, change):
    content = copy.deepcopy(content)
    change(content["optimizer_states"][0])
    return content


def named(content, kind):
    config = {"model": {"init_args": {"optimizer": {"class_path": f"torch.optim.{kind}"}}}}
    return content | {"config": config}


def test_the_state_of_such_a_run_is_right_also_without_its_config(whole):
    check(whole)
    check(named(whole, "AdamW"))
    check(named(whole, "Mine"), kind=None)  # a module that names no optimizer
    check(whole, kind="Mine")  # torch does not know the user's
    check(changed(whole, lambda state: state["param_groups"][0].update(lr=torch.tensor(0.1))))
    check(changed(whole, lambda state: state["state"].pop(0)))  # a parameter that never had a gradient


def test_the_class_is_that_of_the_config_or_else_of_the_settings(whole):
    with pytest.raises(UserError, match=r"holds the state of SGD, and model.optimizer is AdamW: set .* to SGD"):
        check(named(whole, "SGD"))
    with pytest.raises(UserError, match=r"another optimizer than SGD, .*: set model.optimizer to the one of its"):
        check(whole, kind="SGD")
    with pytest.raises(UserError, match="the state of Mine, and"):
        check(named(whole, "Mine"))
    newer = changed(whole, lambda state: state["param_groups"][0].update(new=1))
    check(newer)  # of another version of torch


NO_STATES = {
    "a text": lambda state: state["param_groups"].append("x"),
    "a group without parameters": lambda state: state["param_groups"].append({"lr": 1.0}),
    "moments as text": lambda state: state["state"].update({1: "x"}),
    "no moments": lambda state: state.pop("state"),
    "no groups": lambda state: state.pop("param_groups"),
    "nothing": lambda state: state.clear(),
}


@pytest.mark.parametrize("case", NO_STATES)
def test_what_no_optimizer_writes_is_refused(whole, case):
    with pytest.raises(UserError, match="holds no state of an optimizer under 'optimizer_states'"):
        check(changed(whole, NO_STATES[case]))


def test_a_run_with_an_optimizer_needs_a_state(whole):
    for states in ([], ["x"], [*whole["optimizer_states"], "x"]):
        with pytest.raises(UserError, match="holds no state of an optimizer"):
            check(whole | {"optimizer_states": states})


def made_by(kind, **options):
    """Return the optimizer's part of a checkpoint after a step."""
    optimizer = getattr(torch.optim, kind)((module := Separability(**SIZES)).parameters(), **options)
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    return {"optimizer_states": [optimizer.state_dict()], "lr_schedulers": [{}]}


KINDS = {"SGD": ({"momentum": 0.9}, "momentum_buffer"), "RMSprop": ({}, "square_avg"), "NAdam": ({}, "exp_avg")}


@pytest.mark.parametrize("kind", KINDS)
def test_other_optimizers_are_known_and_their_moments_fit(kind):
    options, moment = KINDS[kind]
    content = made_by(kind, **options)
    check(content, kind)
    with pytest.raises(UserError, match=rf"{moment} of .* does not fit the config: \[7\] there"):
        check(changed(content, lambda state: state["state"][0].update({moment: torch.zeros(7)})), kind)


def test_settings_of_schedules_and_of_other_machines_say_nothing_of_the_class(whole):
    names = ("param_names", "initial_lr", "max_lr", "min_lr", "max_momentum", "base_momentum", "swa_lr")
    group = {"capturable": True, "differentiable": True} | dict.fromkeys(names, 0.1)
    content = changed(
        whole, lambda state: (state["param_groups"][0].update(group), state["param_groups"][0].pop("fused"))
    )
    check({key: value for key, value in content.items() if key != "config"})


def of_first(**values):
    return lambda state: state["state"][0].update(values)


def of_group(**values):
    return lambda state: state["param_groups"][0].update(values)


FAULTS = {
    "a missing step": (lambda state: state["state"][0].pop("step"), "step of a parameter is missing"),
    "half a step": (of_first(step=torch.tensor([1.0, 2.0])), r"step of a parameter is tensor\(\[1., 2.\]\)"),
    "an endless step": (of_first(step=torch.tensor(torch.inf)), "step of a parameter is tensor"),
    "a negative step": (of_first(step=torch.tensor(-1.0)), "step of a parameter is tensor"),
    "a step as text": (of_first(step="1"), "step of a parameter is '1'"),
    "a number as moment": (of_first(exp_avg_sq=0.5), "exp_avg_sq of a parameter is 0.5"),
    "two rates": (of_group(lr=torch.ones(2)), "lr is a tensor of 2 values"),
    "an empty rate": (of_group(lr=torch.ones(0)), "lr is a tensor of 0 values"),
    "a negative rate": (of_group(lr=-1.0), "is damaged: Invalid learning rate: -1.0"),
    "a setting without its moment": (of_group(amsgrad=True), "max_exp_avg_sq of a parameter is missing"),
    "no rate": (lambda state: state["param_groups"][0].pop("lr"), "is damaged: lr is missing"),
    "another moment": (of_first(exp_avg=torch.zeros(3, 3)), r"exp_avg of .* does not fit the config: \[3, 3\] there"),
    "another square": (of_first(exp_avg_sq=torch.zeros(1)), r"exp_avg_sq of .* does not fit the config: \[1\] there"),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_damaged_state_is_named(whole, case):
    change, said = FAULTS[case]
    with pytest.raises(UserError, match=said):
        check(changed(whole, change))


@pytest.mark.parametrize("step", [0, 5, torch.tensor(0.0), torch.tensor([5.0])])
def test_a_count_may_be_a_number_or_a_tensor(whole, step):
    check(changed(whole, of_first(step=step)))


def test_there_is_one_optimizer_of_one_group_with_one_schedule(whole):
    twice = whole | {"optimizer_states": whole["optimizer_states"] * 2}
    with pytest.raises(UserError, match=r"has \d+ parameters, and this run has \d+"):
        check(twice)
    with pytest.raises(UserError, match="1 optimizers, 1 groups of parameters and 0 schedules, and Separability"):
        check(whole | {"lr_schedulers": []})
    parted = changed(whole, lambda state: state["param_groups"].append(state["param_groups"][0] | {"params": []}))
    with pytest.raises(UserError, match="1 optimizers, 2 groups"):
        check(parted)

    class Users(Separability):
        """A module of the user's may have what it likes."""

    check(parted, make=Users)


def test_parameters_that_are_frozen_from_the_start_have_no_moments(whole, tmp_path):
    names = ["network.unembed.*"]
    with pytest.raises(UserError, match=r"other parameters than that of this run: \d+ parameters there and \d+ here"):
        check(whole, callbacks=[ParameterFreeze(names)])
    check(whole, callbacks=[ParameterFreeze(names, at_step=1)])
    fit(tmp_path, 2, [ParameterFreeze(names)])
    check(held(tmp_path), callbacks=[ParameterFreeze(names)])
    with pytest.raises(UserError, match="has other parameters"):
        check(held(tmp_path))
    both = [ParameterFreeze(names), ParameterFreeze(["network.token_embedding.*"])]
    fit(tmp_path / "both", 2, both)
    check(held(tmp_path / "both"), callbacks=both)


def test_an_optimizer_without_an_ordinary_step_is_not_tried(whole):
    for kind in ("LBFGS", "SparseAdam"):
        check(named(whole, kind), kind=kind)
