"""Which bridge and bottleneck the objectives need, and which part of a module a flaw is of."""

from collections.abc import Collection, Mapping

from datamodules.errors import UserError
from lightning_modules.telepathy.bottleneck import Bottleneck, ScalarBottleneck, UntrainedOutput, VectorBottleneck
from lightning_modules.telepathy.bridges import Bridge
from lightning_modules.telepathy.flaws import Flaw
from lightning_modules.telepathy.flow import FlowBridge
from lightning_modules.telepathy.objectives import Objective, ObjectiveName

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
