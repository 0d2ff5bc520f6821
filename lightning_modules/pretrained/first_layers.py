"""Hidden states of the first layers of a model, be it a decoder or an encoder.

Shapes: B batch, T positions, C width.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Reached(Exception):
    """The last layer that is needed has run."""


def layer_stack(model: nn.Module, count: int) -> nn.ModuleList | None:
    """Return the list of a model's `count` layers, whatever its name; None if the model has no such list.

    Of several lists of this length it is the one with the most parameters.
    """
    stacks = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    return max(stacks, key=lambda stack: sum(p.numel() for p in stack.parameters()), default=None)


def with_first_layers(kind: type["PreTrainedModel"], layers: int, count: int) -> type["PreTrainedModel"]:
    """Return a class of models that have only the first `layers` of their `count` layers.

    The others are empty modules, so their weights are neither made nor read, while all that a model derives from its
    number of layers stays as it is.
    """

    def post_init(model: "PreTrainedModel") -> None:
        stack = layer_stack(model, count)
        for index in range(layers, count if stack is not None else 0):
            cast(nn.ModuleList, stack)[index] = nn.Identity()
        kind.post_init(model)  # type: ignore[no-untyped-call]  # transformers has no types here

    # Of the same name and module, by which transformers looks settings up
    return type(kind.__name__, (kind,), {"post_init": post_init, "__module__": kind.__module__})


class FirstLayers(nn.Module):
    """Reads the hidden states of some layers by hooks, and stops after the last of them.

    The states of layer k are what transformers calls `hidden_states[k]`: the output of the k-th layer, and of the last
    layer the output of the whole model, after its final norm.

    Args:
        model: A model, which may lack the layers after the last of `layers`.
        layers: The layers to read, counted from 1.
        count: The number of layers of the whole model.

    Attributes:
        is_bidirectional: Whether a state depends on tokens that come after it. Only then does padding on the right
            change a state, and a mask is passed to the model.
        width: Number of features of the states of all `layers` together.
    """

    def __init__(self, model: "PreTrainedModel", layers: Sequence[int], count: int):
        super().__init__()
        self.model, self.layers, self.count = model, tuple(layers), count
        model.eval()  # type: ignore[no-untyped-call]  # nor here
        model.config.get_text_config().use_cache = False
        stack = layer_stack(model, count)
        self._stack = None if stack is None else list(stack)  # not a module of its own, so that no name occurs twice
        self.is_bidirectional = True
        states = [self._probe(last) for last in (0, 1)]
        self.width = states[0].shape[-1]
        # The shapes are the same, so equal inputs give equal bits
        self.is_bidirectional = not torch.equal(states[0][:, 0], states[1][:, 0])

    @torch.no_grad()
    def _probe(self, last: int) -> Tensor:
        """Return the states of three tokens, of which only the last one depends on `last`."""
        vocabulary = cast(nn.Embedding, self.model.get_input_embeddings()).weight.shape[0]
        tokens_BT = torch.tensor([[3, 4, 5 + last]], device=self.model.device) % vocabulary
        states_BTC: Tensor = self(tokens_BT, torch.ones_like(tokens_BT, dtype=torch.bool))
        return states_BTC

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return states_BTC, the features of all layers side by side.

        Args:
            tokens_BT: Tokens, padded on the right.
            mask_BT: True at real tokens.
        """
        last = max(self.layers)
        options = {"attention_mask": mask_BT.long()} if self.is_bidirectional else {}
        found: dict[int, Tensor] = {}
        if self._stack is None:  # layers that share their weights, such as ALBERT's
            states = self.model(input_ids=tokens_BT, output_hidden_states=True, **options).hidden_states
            return torch.cat([states[layer] for layer in self.layers], dim=-1)

        def keep(layer: int, output: Any) -> None:
            found[layer] = output if isinstance(output, Tensor) else output[0]
            if layer == last:
                raise _Reached

        hooked = {*self.layers} - {self.count}
        handles = [
            self._stack[layer - 1].register_forward_hook(lambda module, args, output, layer=layer: keep(layer, output))
            for layer in hooked
        ]
        try:
            found[self.count] = self.model(input_ids=tokens_BT, **options).last_hidden_state
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat([found[layer] for layer in self.layers], dim=-1)
