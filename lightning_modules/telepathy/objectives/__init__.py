"""The objectives of a bridge: a loss each, by name, and their weighted sum."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor

from datamodules.errors import UserError, check_numbers
from lightning_modules.telepathy.objectives.codes import code_entropy, make_code_entropy, make_commitment
from lightning_modules.telepathy.objectives.content import (
    anchor,
    bag_of_words,
    make_anchor,
    make_bag_of_words,
    make_reconstruction,
)
from lightning_modules.telepathy.objectives.flow import make_flow
from lightning_modules.telepathy.objectives.likelihood import (
    first_tokens,
    kl_text,
    lm,
    make_autoencode,
    make_first_tokens,
    make_kl_text,
    make_lm,
    make_readback,
)
from lightning_modules.telepathy.objectives.spread import (
    batch_diversity,
    contrastive,
    make_batch_diversity,
    make_contrastive,
    make_position_variance,
    make_separation,
    position_variance,
    separation,
)
from lightning_modules.telepathy.objectives.step import BridgeStep, Objective, Sizes

ObjectiveName = Literal[
    "lm",
    "batch_diversity",
    "contrastive",
    "kl_text",
    "anchor",
    "reconstruction",
    "bag_of_words",
    "autoencode",
    "readback",
    "first_tokens",
    "position_variance",
    "separation",
    "flow",
    "commitment",
    "code_entropy",
]
Setting = float | dict[str, float | str]  # a weight, or the weight with options of the objective

OBJECTIVES: dict[ObjectiveName, Callable[..., Objective]] = {
    "lm": make_lm,
    "batch_diversity": make_batch_diversity,
    "contrastive": make_contrastive,
    "kl_text": make_kl_text,
    "anchor": make_anchor,
    "reconstruction": make_reconstruction,
    "bag_of_words": make_bag_of_words,
    "autoencode": make_autoencode,
    "readback": make_readback,
    "first_tokens": make_first_tokens,
    "position_variance": make_position_variance,
    "separation": make_separation,
    "flow": make_flow,
    "commitment": make_commitment,
    "code_entropy": make_code_entropy,
}

__all__ = [
    "OBJECTIVES",
    "BridgeStep",
    "Objective",
    "ObjectiveName",
    "Setting",
    "Sizes",
    "anchor",
    "bag_of_words",
    "batch_diversity",
    "code_entropy",
    "contrastive",
    "first_tokens",
    "kl_text",
    "lm",
    "make_objectives",
    "position_variance",
    "separation",
    "weighted",
]


def make_objectives(settings: Mapping[ObjectiveName, Setting]) -> dict[ObjectiveName, Objective]:
    """Return the objectives of `model.objectives`, each with its weight.

    Raises:
        UserError: There is no such objective or option, a number is out of range, or none has a weight.
    """
    made: dict[ObjectiveName, Objective] = {}
    for name, setting in settings.items():
        if name not in OBJECTIVES:
            raise UserError(f"model.objectives has no '{name}': choose among {', '.join(OBJECTIVES)}")
        options = _checked(name, setting if isinstance(setting, Mapping) else {"weight": setting})
        weight = options.pop("weight", 1.0)
        check_numbers("model.objectives", 0, **{str(name): weight})
        made[name] = replace(OBJECTIVES[name](**options), weight=weight)
    if not any(objective.weight for objective in made.values()):
        raise UserError("model.objectives is empty: give at least one objective a weight, such as {lm: 1.0}")
    return made


def _checked(name: ObjectiveName, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the weight and options of an objective, after a check that it has them and that their values fit."""
    kinds: dict[str, Any] = {"weight": float}
    kinds |= {
        key: known.annotation for key, known in inspect.signature(OBJECTIVES[name], eval_str=True).parameters.items()
    }
    for option, value in options.items():
        where = f"model.objectives.{name}"
        if option not in kinds:
            raise UserError(f"{where} has no '{option}': choose among {', '.join(kinds)}")
        kind, allowed = kinds[option], get_args(kinds[option])
        if allowed and value not in allowed:
            raise UserError(f"{where}.{option} has no {value!r}: choose among {', '.join(allowed)}")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not allowed and not (is_number and (kind is float or float(value).is_integer())):
            raise UserError(f"{where}.{option} must be a number of type {kind.__name__}, not {value!r}")
    return dict(options)


def weighted(
    objectives: Mapping[ObjectiveName, Objective], step: BridgeStep, token_weight: Callable[[Tensor | int], Any]
) -> dict[str, Tensor]:
    """Return each weighted loss of a training step.

    Args:
        objectives: The objectives.
        step: The step.
        token_weight: Returns the weight of this rank for its number of tokens.
    """
    losses: dict[str, Tensor] = {}
    for name, objective in objectives.items():
        share = 1.0 if objective.mass is None else token_weight(objective.mass(step))
        losses[name] = objective.weight * share * objective.loss(step)
    return losses
