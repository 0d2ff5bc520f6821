"""Other models of this line, read from checkpoints: to begin from, to be orthogonal to, or to hand on."""

from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import lightning
import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from datamodules.batch import IGNORE
from datamodules.errors import UserError
from lightning_modules.core.checkpoints import read_state
from lightning_modules.core.ensemble import call_members, fit_state, member_state

if TYPE_CHECKING:
    from lightning_modules.separability.module import Separability

PREFIX = "network."


def load_network(path: str, network: nn.Module, members: int, key: str) -> dict[str, Tensor]:
    """The network's parameters in a checkpoint; a single model's are given to every member.

    Raises:
        UserError: There is no such file.
        UserError: The file is damaged or does not fit; names `key`, the config's.
    """
    state = read_state(path, key)
    own = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    return fit_state(own, network.state_dict(), members, f"{key} {path}")


class Orthogonality:
    """A penalty on residual streams that point where an anchor model's do, position by position.

    `squared`: mean of cos^2(x, x') over labelled positions, x' the anchor's stream, both as the final norm reads them:
    where that is a LayerNorm, less their mean over features. Else a constant added to all features, which it takes
    away again, would make any two streams orthogonal. `seed`: |mean of cos(x, x')|, as the notes have it: zero also
    where cosines of both signs cancel.

    Args:
        anchor: Checkpoint of the anchor: a model of the same shape, or an ensemble, member by member.
        weight: lambda, what the penalty is multiplied by; 0 only measures.
        form: Which of the two.
    """

    def __init__(self, anchor: str, weight: float = 1.0, form: Literal["squared", "seed"] = "squared"):
        if weight < 0:
            raise UserError(f"model.orthogonality.weight must be at least 0, not {weight}")
        self.anchor, self.weight, self.form = anchor, weight, form
        self.network: nn.Module | None = None
        self.train_residual = self.residual  # compiled with the step

    def load(self, network: nn.Module, members: int) -> None:
        """Make the anchor model, once: a copy that has no place among the parameters, and no hooks of callbacks."""
        if self.network is None:
            state = load_network(self.anchor, network, members, "model.orthogonality.anchor")
            self.network, self.members = _copy(network).requires_grad_(False), members
            self.network.load_state_dict(state)

    @torch.no_grad()
    def residual(self, tokens: Tensor) -> Tensor:
        """The anchor's stream x'_SBTD."""
        network = self.network.to(tokens.device)
        if self.members > 1:
            return call_members(network, self.members, tokens, with_residual=True)[1]
        return network(tokens, with_residual=True)[1][None]

    def cosine(self, x_SBTD: Tensor, anchor_SBTD: Tensor) -> Tensor:
        """cos(x, x') at each position, [S, B, T], of what the final norm reads."""
        x_SBTD, anchor_SBTD = x_SBTD.float(), anchor_SBTD.float()
        if isinstance(self.network.final_norm, nn.LayerNorm):
            x_SBTD, anchor_SBTD = (x - x.mean(3, keepdim=True) for x in (x_SBTD, anchor_SBTD))
        return cosine_similarity(x_SBTD, anchor_SBTD, dim=3)

    def penalty(self, x_SBTD: Tensor, tokens: Tensor, labels: Tensor) -> Tensor:
        """The penalty of each member, [S]."""
        cosine_SBT = self.cosine(x_SBTD, self.train_residual(tokens))
        asked_SBT = (labels != IGNORE).expand(cosine_SBT.shape)
        terms_SBT = (cosine_SBT.square() if self.form == "squared" else cosine_SBT) * asked_SBT
        mean_S = terms_SBT.flatten(1).sum(1) / asked_SBT.flatten(1).sum(1).clamp(min=1)
        return mean_S if self.form == "squared" else mean_S.abs()


def _copy(network: nn.Module) -> nn.Module:
    hooks = {module: module._forward_hooks for module in network.modules()}
    for module in hooks:
        module._forward_hooks = type(module._forward_hooks)()
    try:
        return deepcopy(network)
    finally:
        for module, own in hooks.items():
            module._forward_hooks = own


def write_members(module: "Separability") -> None:
    """Write `members/<seed>.ckpt` for each member: a checkpoint that an ordinary model of that size loads."""
    folder = Path(module.trainer.log_dir or module.trainer.default_root_dir, "members")  # a collective
    if not module.trainer.is_global_zero:
        return
    folder.mkdir(parents=True, exist_ok=True)
    state = module.network.state_dict()
    for member in range(module.ensemble):
        own = member_state(state, member) if module.ensemble > 1 else state
        held = {"state_dict": {PREFIX + name: value.cpu() for name, value in own.items()}}
        held |= {"epoch": module.current_epoch, "global_step": module.global_step}
        torch.save(
            held | {"pytorch-lightning_version": lightning.__version__}, folder / f"{module.first_seed + member}.ckpt"
        )
