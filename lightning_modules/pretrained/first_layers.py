"""Hidden states of the first layers of a model, be it a decoder or an encoder.

Shapes: B batch, T positions, C width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from datamodules.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Reached(Exception):
    """The last layer that is needed has run."""


class _Empty(nn.Module):
    """The place of a layer, without weights but with its settings, such as its kind of attention."""

    def __init__(self, layer: nn.Module):
        super().__init__()
        vars(self).update({name: value for name, value in vars(layer).items() if not name.startswith("_")})


def layer_stack(model: nn.Module, count: int) -> nn.ModuleList | None:
    """Return the list of a model's `count` layers, whatever its name.

    Lists inside of layers, such as those of experts, do not count. None if the model has no such list, or several, of
    which one may belong to another part, such as the reader of images.
    """
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList) and len(module) == count]
    inner = {id(module) for outer in lists for module in outer.modules() if module is not outer}
    stacks = [stack for stack in lists if id(stack) not in inner]
    return stacks[0] if len(stacks) == 1 else None


def with_first_layers(kind: type["PreTrainedModel"], layers: int, count: int) -> type["PreTrainedModel"]:
    """Return a class of models of which only the first `layers` of their `count` layers have weights.

    The others are empty, so their weights are neither made nor read, while all that a model derives from its number of
    layers and from their kinds stays as it is.
    """

    def post_init(model: "PreTrainedModel") -> None:
        stack = layer_stack(model, count)
        for index in range(layers, count if stack is not None else 0):
            cast(nn.ModuleList, stack)[index] = _Empty(cast(nn.ModuleList, stack)[index])
        kind.post_init(model)  # type: ignore[no-untyped-call]  # transformers has no types here

    # Of the same name and module, by which transformers looks settings up
    return type(kind.__name__, (kind,), {"post_init": post_init, "__module__": kind.__module__})


class FirstLayers(nn.Module):
    """Reads the hidden states of some layers by hooks, and stops after the last of them.

    The states of layer k are the input of layer k + 1, and of the last layer the output of the whole model, after its
    final norm if the model's list of states has it. Transformers calls them `hidden_states[k]`, but for Mamba's kind,
    whose list begins with layer 1.

    Args:
        model: A model, of which the layers after the last of `layers` may be empty.
        layers: The layers to read, counted from 1.
        count: The number of layers of the whole model; None to take the states from transformers' own list.

    Attributes:
        is_bidirectional: Whether a state depends on tokens that come after it. Only then does padding on the right
            change a state, and a mask is passed to the model.
        width: Number of features of the states of all `layers` together.

    Raises:
        UserError: The layers do not give one state per token.
    """

    def __init__(self, model: "PreTrainedModel", layers: Sequence[int], count: int | None):
        super().__init__()
        self.model, self.layers, self.count = model, tuple(layers), count
        model.eval()  # type: ignore[no-untyped-call]  # nor here
        model.config.get_text_config().use_cache = False
        stack = None if count is None else layer_stack(model, count)
        self._stack = None if stack is None else list(stack)  # not a module of its own, so that no name occurs twice
        self.is_bidirectional, self.reads_padding = True, False
        with _without_kernels_of_gpus(model):
            self._probe()
        for hook in [hook for part in model.modules() for hook in part._forward_hooks.values()]:
            made: Any = hook  # by transformers for its list of states; it has nothing to do outside the model's calls
            made.is_idle = lambda: True

    @torch.no_grad()
    def _probe(self) -> None:
        """Find out by the states of a few tokens where they are found, and what they depend on."""
        vocabulary = cast(nn.Embedding, self.model.get_input_embeddings()).weight.shape[0]
        tokens_BT = torch.tensor([[3, 4, 5, 0, 0], [3, 4, 6, 0, 0]], device=self.model.device) % vocabulary
        mask_BT = torch.arange(5, device=tokens_BT.device).expand(2, -1) < 3
        if self.count in self.layers:
            output = self.model(input_ids=tokens_BT[:1, :3], output_hidden_states=True)
            if not torch.equal(output.last_hidden_state, output.hidden_states[-1]):
                self._stack = None  # its list ends before the final norm
        # One row at a time: the shapes are the same, so equal inputs give equal bits
        short, other, padded = (
            self(tokens_BT[row : row + 1, :length], mask_BT[:1, :length]) for row, length in ((0, 3), (1, 3), (0, 5))
        )
        if short.dim() != 3 or short.shape[1] != 3:
            raise UserError(f"model.source: its layers give states of the shape {[*short.shape]} for three tokens")
        self.width = short.shape[-1]
        self.is_bidirectional = not torch.equal(short[:, 0], other[:, 0])
        rounding = torch.finfo(short.dtype).eps ** 0.5 * short.abs().max()
        self.reads_padding = bool(((short - padded[:, :3]).abs() > rounding).any())

    def forward(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return states_BTC, the features of all layers side by side.

        The states of a row are those that the model gives to the row alone. A model that reads padding in spite of its
        mask, by convolutions for instance, gets rows of one length at a time.

        Args:
            tokens_BT: Tokens, padded on the right.
            mask_BT: True at real tokens.
        """
        if not self.reads_padding:
            return self._states(tokens_BT, mask_BT)
        lengths_B = mask_BT.sum(1)
        parts = []
        for length in sorted(set(lengths_B.tolist())):
            rows_B = lengths_B == length
            states_BTC = self._states(tokens_BT[rows_B, :length], mask_BT[rows_B, :length])
            parts.append((rows_B, nn.functional.pad(states_BTC, (0, 0, 0, tokens_BT.shape[1] - length))))
        states_BTC = torch.empty_like(parts[0][1][:1]).repeat(len(tokens_BT), 1, 1)
        for rows_B, part_BTC in parts:
            states_BTC[rows_B] = part_BTC
        return states_BTC

    def _states(self, tokens_BT: Tensor, mask_BT: Tensor) -> Tensor:
        options = {"attention_mask": mask_BT.long()} if self.is_bidirectional else {}
        if self._stack is None:
            states = self.model(input_ids=tokens_BT, output_hidden_states=True, **options).hidden_states
            return torch.cat([states[layer] for layer in self.layers], dim=-1)
        found: dict[int | None, Tensor] = {}

        def keep(layer: int, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            found[layer] = next(value for value in (*args, *named.values()) if isinstance(value, Tensor))
            if layer == max(self.layers):
                raise _Reached

        handles = [
            self._stack[layer].register_forward_pre_hook(
                lambda module, args, named, layer=layer: keep(layer, args, named), with_kwargs=True
            )
            for layer in {*self.layers} - {self.count}
        ]
        try:
            found[self.count] = self.model(input_ids=tokens_BT, **options).last_hidden_state
        except _Reached:
            pass
        finally:
            for handle in handles:
                handle.remove()
        return torch.cat([found[layer] for layer in self.layers], dim=-1)


@contextmanager
def _without_kernels_of_gpus(model: "PreTrainedModel") -> Iterator[None]:
    """Let a model on the CPU attend without kernels that need a GPU, such as those of `flash_attention_2`."""
    chosen: str = model.config._attn_implementation
    if model.device.type != "cpu" or chosen in ("eager", "sdpa"):
        yield
        return
    model.set_attn_implementation("eager")
    yield
    model.set_attn_implementation(chosen)
