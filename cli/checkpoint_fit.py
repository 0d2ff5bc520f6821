"""Whether the content of a checkpoint fits a model and a trainer that have been built, before it is restored."""

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from datamodules.errors import UserError
from lightning_modules.core.checkpoints import AVERAGED
from lightning_modules.core.ensemble import tied_mismatch

# Hooks with which a module of the user's may change its parameters or the checkpoint before it is restored
HOOKS = ("configure_model", "on_load_checkpoint", "setup")
KNOWN = ("lightning_modules.", "lightning.")  # code whose hooks do not
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
    return tied_mismatch(state, expected) if by_name else None


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
