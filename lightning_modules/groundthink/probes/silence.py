"""Forwards in which the recurrent state holds nothing, or nothing that was written before the queries.

Shapes: B rows, T positions, H heads.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

from kernels.gated_delta.reference import FLOORS
from lightning_modules.mixers.gated_delta import GatedDelta

GONE = FLOORS[torch.float32]  # log-decay after which nothing is left

State = Literal["on", "cleared", "off"]


def delta_mixers(network: nn.Module) -> dict[str, GatedDelta]:
    """Return the gated delta mixers of a network by name, such as `blocks.0.gated_delta`."""
    return {name: module for name, module in network.named_modules() if isinstance(module, GatedDelta)}


@contextmanager
def state_set(network: nn.Module, state: State, first_B: Tensor) -> Iterator[None]:
    """Run forwards of the block with the state of all gated delta mixers as it is, cleared, or off.

    Both act by hooks on the gates, so the kernels run as always.

    Args:
        network: The network.
        state: `cleared` removes all that was written before a row's first query, by its decay; `off` sets every writing
            strength to 0, so that the state is 0 at each position, and window attention is left.
        first_B: Position of each row's first query.
    """

    def clear(module: nn.Module, args: object, log_decay_BTH: Tensor) -> Tensor:
        positions_T = torch.arange(log_decay_BTH.shape[1], device=log_decay_BTH.device)
        return log_decay_BTH.masked_fill((positions_T == first_B[:, None])[..., None], GONE)

    def silence(module: nn.Module, args: object, beta_BTH: Tensor) -> Tensor:
        return torch.zeros_like(beta_BTH)

    hooks: dict[State, tuple[str, Callable[[nn.Module, object, Tensor], Tensor]]] = {
        "cleared": ("log_decay", clear),
        "off": ("beta", silence),
    }
    with ExitStack() as stack:
        if state in hooks:
            site, hook = hooks[state]
            for mixer in delta_mixers(network).values():
                handle = mixer.gates.get_submodule(site).register_forward_hook(hook)
                stack.callback(handle.remove)
        yield
