"""The objectives of a bridge: a loss each, by name, and their weighted sum."""

import inspect
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import Any, Literal, get_args

from torch import Tensor

from datamodules.errors import UserError, check_numbers
from lightning_modules.telepathy.bottleneck import Bottleneck, ScalarBottleneck, UntrainedOutput, VectorBottleneck
from lightning_modules.telepathy.bridges import Bridge
from lightning_modules.telepathy.flaws import Flaw
from lightning_modules.telepathy.flow import FlowBridge
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

# Flaws of single objectives, without which they would do nothing
FLAW_OF: dict[Flaw, ObjectiveName] = {
    "mean_pool": "reconstruction",
    "self_contrast": "contrastive",
    "constant_anchor": "anchor",
    "anchor_scale": "anchor",
    "own_head": "bag_of_words",
    "flow_scale": "flow",
    "dead_diversity": "position_variance",
    "pooled_variance": "position_variance",
}

__all__ = [
    "FLAW_OF",
    "OBJECTIVES",
    "BridgeStep",
    "Objective",
    "ObjectiveName",
    "Setting",
    "Sizes",
    "anchor",
    "bag_of_words",
    "batch_diversity",
    "check_parts",
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


def check_parts(
    objectives: Mapping[ObjectiveName, Objective], bridge: Bridge, bottleneck: Bottleneck, flaws: Collection[Flaw]
) -> None:
    """Check that bridge and bottleneck have what the objectives read, and that each flaw is of a part that is there.

    Raises:
        UserError: An objective needs a bottleneck, a `FlowBridge` or embeddings, or a flaw would do nothing.
    """
    if "code_entropy" in objectives and not bottleneck.size:
        raise UserError("model.objectives.code_entropy needs codes: set model.bottleneck to vq or fsq")
    if "commitment" in objectives and not isinstance(bottleneck, VectorBottleneck):
        raise UserError("model.objectives.commitment needs a codebook: set model.bottleneck to vq")
    weighted_ones = {name for name, objective in objectives.items() if objective.weight}
    if "dead_diversity" in flaws and weighted_ones == {"position_variance"}:
        raise UserError("model.reproduce_flaws: dead_diversity leaves position_variance no gradient: add an objective")
    if "flow" in objectives and not isinstance(bridge, FlowBridge):
        raise UserError(f"model.objectives.flow needs a FlowBridge as model.bridge, not a {type(bridge).__name__}")
    if "bag_of_words" in objectives and not bridge.embeds:
        raise UserError(
            f"model.objectives.bag_of_words compares embeddings, and a {type(bridge).__name__} makes none: leave it out"
        )
    for flaw, of in FLAW_OF.items():
        if flaw in flaws and of not in objectives:
            raise UserError(f"model.reproduce_flaws: {flaw} needs the objective {of} in model.objectives")
    for flaw, kind, choice in (
        ("bare_codes", (VectorBottleneck, ScalarBottleneck), "vq or fsq"),
        ("codebook_scale", VectorBottleneck, "vq"),
        ("untrained_output", UntrainedOutput, "none"),
    ):
        if flaw in flaws and not isinstance(bottleneck, kind):
            raise UserError(f"model.reproduce_flaws: {flaw} needs model.bottleneck {choice}")


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
