"""A bridge from the keys and values of a source to those of a target.

Shapes: B batch, S source positions, C width of the source states, F features of a layer, K soft tokens, D target width.
"""

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from datamodules.errors import SIZE, check_numbers
from lightning_modules.telepathy.bridge_layers import start_equal
from lightning_modules.telepathy.bridges import Bridge
from lightning_modules.telepathy.source import Source
from lightning_modules.telepathy.target import Target


class KVBridge(Bridge):
    """Keys and values for each layer of the target, by learned maps from those of the source.

    A soft token is the keys and values of all target layers at one position, side by side. In the target's cache they
    take the place of those that the target would make of a token. The states are the keys and values of the source's
    layers `model.source_layer`. All keys are without position: those of the source are read before its RoPE turns them,
    and the target's RoPE turns what it gets to the position of the soft token. Both are standardised (`KeyValues`), so
    a soft token of zeros is an average key and value of each layer.

    Target layer l reads the `reach` source layers whose places in the list of layers are nearest to its own place in
    depth. A map reads all heads of these layers together, so layers, heads and their widths may differ in number. The
    soft tokens of a source token start equal (`start_equal`).

    Args:
        source: The source, which is asked to give keys and values.
        target: The target, which is asked to take keys and values.
        key_norm: Use LayerNorm on what a target layer reads.
        tokens_per_source: Soft tokens per source token. A number that is one source token is several tokens to a target
            that reads single digits.
        reach: Number of source layers that a target layer reads; at most that of `model.source_layer`.
        hidden: Width of the hidden layer of an MLP for each target layer; linear maps if None.

    Raises:
        UserError: A size is out of range, or a model's keys are not to be had without positions.
    """

    embeds = False

    def __init__(
        self,
        source: Source,
        target: Target,
        key_norm: bool = True,
        tokens_per_source: int = 1,
        reach: int = 1,
        hidden: int | None = None,
    ):
        super().__init__()
        check_numbers("model.bridge", 1, SIZE, tokens_per_source=tokens_per_source, hidden=hidden)
        self.read, written = source.read_key_values(), target.take_key_values()
        check_numbers("model.bridge", 1, len(self.read), reach=reach)
        self.tokens_per_source = tokens_per_source
        self.near = [nearest(layer, len(written), len(self.read), reach) for layer in range(len(written))]
        self.maps = nn.ModuleList(
            _map(sum(self.read[layer] for layer in near), width, tokens_per_source, hidden, key_norm)
            for near, width in zip(self.near, written, strict=True)
        )

    def forward(self, states_BSC: Tensor, mask_BS: Tensor) -> Tensor:
        """Return soft_BKD."""
        layers = cast(Sequence[Tensor], states_BSC.split(self.read, dim=-1))  # type: ignore[no-untyped-call]  # torch lacks types
        parts = []
        for own, near in zip(self.maps, self.near, strict=True):
            part_BSF = own(torch.cat([layers[layer] for layer in near], dim=-1))
            parts.append(part_BSF.unflatten(-1, (self.tokens_per_source, -1)).flatten(1, 2))
        return torch.cat(parts, dim=-1)

    def soft_mask(self, mask_BS: Tensor) -> Tensor:
        """Return mask_BK: the soft tokens of real source tokens."""
        return mask_BS.repeat_interleave(self.tokens_per_source, dim=1)


def nearest(layer: int, layers: int, listed: int, reach: int) -> list[int]:
    """Return the indices of the `reach` listed layers that are nearest to a layer in depth, in their order.

    Args:
        layer: The layer of the target, counted from 0.
        layers: Number of the target's layers.
        listed: Number of the source's layers that are read.
        reach: Number of indices.
    """
    place = layer * (listed - 1) / max(layers - 1, 1)
    return sorted(sorted(range(listed), key=lambda index: abs(index - place))[:reach])


def _map(read: int, written: int, parts: int, hidden: int | None, key_norm: bool) -> nn.Sequential:
    last = nn.Linear(hidden or read, parts * written)
    start_equal(last, parts)
    norm = nn.LayerNorm(read) if key_norm else nn.Identity()
    return nn.Sequential(norm, *([] if hidden is None else [nn.Linear(read, hidden), nn.GELU()]), last)
