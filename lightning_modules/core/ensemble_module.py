"""A LightningModule whose network is one seed, or S seeds in one program.

Shapes: S ensemble members, B batch, T positions, V vocabulary.
"""

from collections.abc import Callable, Sequence

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.optim import Optimizer

from datamodules.errors import UserError
from lightning_modules.core.contracts import StatefulNetwork
from lightning_modules.core.ensemble import as_tuple, call_members, observe, stack_members
from lightning_modules.core.generation import GREEDY, Sampling, generate
from lightning_modules.core.sites import match_modules


class EnsembleModule(LightningModule):
    """A network, its activations, and what each member of an ensemble has for itself: clipping and measures.

    Args:
        make_network: Makes one network with random weights; called once per seed, with that seed set.
        seeds: One seed per member.

    Attributes:
        ensemble: S.
        network: The network; if S is above 1, every parameter has a first axis of S.
        members: Measure -> values_S, as last logged.
        counts: Measure -> number of samples, for each member.
        hits: Proportion -> hits of each member.
        intervals: Measure -> 95 % interval, if S is 1.
    """

    network_options: dict[str, bool] = {}  # noqa: RUF012 (keyword arguments of every call of the network)

    def __init__(self, make_network: Callable[[], nn.Module], seeds: Sequence[int]):
        super().__init__()
        self.seeds, self.ensemble = list(seeds), len(seeds)
        self.network = stack_members(make_network, self.seeds)
        self.members: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.hits: dict[str, list[int]] = {}
        self.intervals: dict[str, tuple[float, float]] = {}

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits_BTV; for an ensemble logits_SBTV, from tokens_SBT or from tokens_BT that all members share."""
        return self.call(tokens)[0] if self.ensemble > 1 else as_tuple(self.network(tokens))[0]

    def call(self, tokens: Tensor, labels: Tensor | None = None, **options: bool) -> tuple[Tensor, ...]:
        """Return the outputs of the network, each with a first axis of S, also if S is 1; logits_SBTV come first.

        Args:
            tokens: [S, B, T], or [B, T] where all members share them.
            labels: Likewise; for hooks that ask for them.
            **options: Keyword arguments of this call of the network, beside `network_options`.
        """
        options = self.network_options | options
        if self.ensemble > 1:
            return call_members(self.network, self.ensemble, tokens, labels, **options)
        return tuple(output[None] for output in as_tuple(self.network(tokens, **options)))

    def activations(self, tokens: Tensor, sites: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits_SBTV, and the outputs of the modules that match `sites`, by name, each with a first axis of S.

        For a module that runs several times, such as a recurrent cell, it is the last output.

        Raises:
            UserError: A pattern matches no module.
        """
        seen: dict[str, Tensor] = {}

        def hook_for(name: str) -> Callable[[nn.Module, tuple[object, ...], Tensor], None]:
            def keep(x: Tensor) -> None:
                seen[name] = x if self.ensemble > 1 else x[None]

            return lambda module, inputs, output: observe(output, keep)

        handles = [module.register_forward_hook(hook_for(name)) for name, module in match_modules(self, sites).items()]
        try:
            return self.call(tokens)[0], seen
        finally:
            for handle in handles:
                handle.remove()

    def generate(
        self,
        prompt_BT: Tensor,
        max_new_tokens: int,
        sampling: Sampling = GREEDY,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Return the new tokens_BN after a prompt; see `core.generation.generate`.

        Raises:
            UserError: The model is an ensemble, or its network cannot run one position at a time.
        """
        if self.ensemble > 1 or not isinstance(self.network, StatefulNetwork):
            raise UserError(f"{type(self).__name__} cannot generate: it needs a single network with `step`")
        return generate(self.network, prompt_BT, max_new_tokens, sampling, generator)

    def configure_gradient_clipping(
        self, optimizer: Optimizer, gradient_clip_val: float | None = None, gradient_clip_algorithm: str | None = None
    ) -> None:
        """Clip the gradient of each member by the norm of that member's gradient."""
        if self.ensemble == 1 or not gradient_clip_val or gradient_clip_algorithm == "value":
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
            return
        gradients = [parameter.grad for parameter in self.network.parameters() if parameter.grad is not None]
        if not gradients:
            return  # all parameters are frozen
        squares_S = torch.stack([gradient.flatten(1).square().sum(1) for gradient in gradients]).sum(0)
        factor_S = (gradient_clip_val / (squares_S.sqrt() + 1e-6)).clamp(max=1)  # the formula of clip_grad_norm_
        for gradient in gradients:
            gradient.mul_(factor_S.view(-1, *[1] * (gradient.dim() - 1)))

    def log_members(self, values: dict[str, Tensor]) -> None:
        """Log the means over members of values that are the same on every rank, and keep the value of every member."""
        for name, values_S in values.items():
            # sync_dist changes nothing in equal values; without it Lightning advises to set it
            self.log(name, values_S.float().mean(), sync_dist=True)
            self.members[name] = values_S.detach().float().cpu().reshape(-1)  # torchmetrics drops an axis of one
