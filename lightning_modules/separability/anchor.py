"""An anchor model, read from a checkpoint, whose residual stream a model is trained to avoid.

Shapes: S ensemble members, B batch, T positions, D width.
"""

from copy import deepcopy
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from datamodules.batch import IGNORE
from datamodules.errors import check_numbers
from lightning_modules.core.checkpoints import check_finite, load_network
from lightning_modules.core.ensemble import call_members

ANCHOR = "model.orthogonality.anchor"


class Orthogonality:
    """A penalty on residual streams that point in the direction of an anchor model's stream, position by position.

    With x and x' the two streams at a labelled position, as the final norm reads them (less their mean over features
    if that norm is a LayerNorm):

    - `squared`: mean of cos^2(x, x').
    - `seed`: |mean of cos(x, x')|, the form of the notes; also zero where cosines of both signs cancel.

    A LayerNorm removes a constant added to all features. If the cosine contained such a constant, any two streams could
    be made orthogonal by it.

    Args:
        anchor: Checkpoint of the anchor: a model of the same shape, or an ensemble, member by member.
        weight: lambda, the factor of the penalty; 0 only measures.
        form: `squared` or `seed`, as above.

    Raises:
        UserError: The weight is negative or not finite.
    """

    def __init__(self, anchor: str, weight: float = 1.0, form: Literal["squared", "seed"] = "squared"):
        check_numbers("model.orthogonality", 0, weight=weight)
        self.anchor, self.weight, self.form = anchor, weight, form
        self.network: nn.Module | None = None
        self.members = 1
        self.train_residual = self.residual  # compiled with the training step

    def load(self, network: nn.Module, members: int) -> None:
        """Make the anchor model, once: a copy of the network without hooks, which is no submodule of the model.

        Raises:
            UserError: The checkpoint does not exist, is damaged, does not fit, or holds weights that are not finite.
        """
        if self.network is None:
            state = load_network(self.anchor, network, members, ANCHOR)
            check_finite({"state_dict": state}, ANCHOR, self.anchor, members)
            self.network, self.members = _copy(network).requires_grad_(False), members
            self.network.load_state_dict(state)

    @torch.no_grad()
    def residual(self, tokens: Tensor) -> Tensor:
        """Return the stream of the anchor, x'_SBTD."""
        network = cast(nn.Module, self.network).to(tokens.device)
        if self.members > 1:
            return call_members(network, self.members, tokens, with_residual=True)[1]
        return cast(Tensor, network(tokens, with_residual=True)[1][None])

    def cosine(self, x_SBTD: Tensor, anchor_SBTD: Tensor) -> Tensor:
        """Return cos(x, x') at each position, [S, B, T]."""
        x_SBTD, anchor_SBTD = x_SBTD.float(), anchor_SBTD.float()
        if isinstance(cast(nn.Module, self.network).final_norm, nn.LayerNorm):
            x_SBTD, anchor_SBTD = (x - x.mean(3, keepdim=True) for x in (x_SBTD, anchor_SBTD))
        return cosine_similarity(x_SBTD, anchor_SBTD, dim=3)

    def penalty(self, x_SBTD: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        """Return the penalty of each member, [S]."""
        cosine_SBT = self.cosine(x_SBTD, self.train_residual(tokens))
        labelled_SBT = (labels != IGNORE).expand(cosine_SBT.shape)
        terms_SBT = (cosine_SBT.square() if self.form == "squared" else cosine_SBT) * labelled_SBT
        mean_S = terms_SBT.flatten(1).sum(1) / labelled_SBT.flatten(1).sum(1).clamp(min=1)
        return mean_S if self.form == "squared" else mean_S.abs()


def _copy(network: nn.Module) -> nn.Module:
    """Return a deep copy without forward hooks, which may hold what cannot be copied."""
    hooks = {module: module._forward_hooks for module in network.modules()}
    for module in hooks:
        module._forward_hooks = type(module._forward_hooks)()
    try:
        return deepcopy(network)
    finally:
        for module, registered in hooks.items():
            module._forward_hooks = registered
