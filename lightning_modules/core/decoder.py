"""The decoder that the lines share: embeddings, blocks of a mixer and an MLP, norms, and an unembedding.

Shapes: B batch, T positions, V vocabulary, D width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from datamodules.errors import UserError
from lightning_modules.core.block import Block, Factory, StatefulMixer


@dataclass
class DecoderState:
    """The state of a decoder between two positions.

    Attributes:
        position: Positions that the decoder has seen.
        mixers: The state of each block's mixer.
    """

    position: int
    mixers: list[Any]


class Decoder(nn.Module):
    """Token embedding, optional learned positions, blocks, a final norm, and an unembedding that is not tied.

    Sites: `embedding`, `blocks.<i>.{<mixer>, mid_residual, mlp, residual}`, `final_residual` (the stream that the final
    norm reads) and `final_norm`. Embeddings and unembedding begin as N(0, 1 / D).

    Args:
        vocab_size: V.
        width: D.
        mixers: One factory per block.
        mlp: Makes the MLP of a block; None for blocks without one.
        norm: Makes a norm of a given width; `nn.Identity` for a decoder without norms.
        positions: Length of the learned position embedding, the longest row; None for a decoder without positions.
        dropout: Share of the outputs of each mixer and MLP that are zeroed in training.
    """

    def __init__(
        self,
        vocab_size: int,
        width: int,
        mixers: Sequence[Factory],
        mlp: Factory | None,
        norm: Callable[[int], nn.Module] = nn.LayerNorm,
        positions: int | None = None,
        dropout: float = 0.0,
    ):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = None if positions is None else nn.Embedding(positions, width)
        self.embedding = nn.Identity()
        self.blocks = nn.ModuleList(Block(width, mixer, mlp, norm, dropout) for mixer in mixers)
        self.final_residual, self.final_norm = nn.Identity(), norm(width)
        self.unembed = nn.Linear(width, vocab_size, bias=False)
        for layer in (self.token_embedding, self.position_embedding, self.unembed):
            if layer is not None:
                nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(
        self, tokens_BT: Tensor, with_residual: bool = False, with_logits: bool = True
    ) -> Tensor | tuple[Tensor, ...]:
        """Return logits_BTV, or without `with_logits` what the unembedding reads, [B, T, D].

        With `with_residual` also return the stream at `final_residual`, [B, T, D].
        """
        x_BTD = self.stream(tokens_BT)
        output: Tensor = self.final_norm(x_BTD)
        if with_logits:
            output = self.unembed(output)
        return (output, x_BTD) if with_residual else output

    def stream(self, tokens_BT: Tensor) -> Tensor:
        """Return the stream at `final_residual`, [B, T, D]."""
        x_BTD = self.token_embedding(tokens_BT)
        if self.position_embedding is not None:
            x_BTD = x_BTD + self.position_embedding.weight[: tokens_BT.shape[1]]
        x_BTD = self.embedding(x_BTD)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        return cast(Tensor, self.final_residual(x_BTD))

    def init_state(self, batch: int) -> DecoderState:
        """Return the state before the first position.

        Raises:
            UserError: A mixer cannot run one position at a time, or a callback has a hook on the network, which expects
            whole rows.
        """
        if hooked := [name for name, module in self.named_modules() if module._forward_hooks]:
            raise UserError(f"generation runs one position at a time, without the hook of a callback on {hooked[0]}")
        states = []
        for block in self._blocks():
            if not isinstance(block.mixer, StatefulMixer):
                raise UserError(f"the mixer {type(block.mixer).__name__} cannot generate: it has no `step`")
            states.append(block.mixer.init_state(batch))
        return DecoderState(0, states)

    def step(self, token_B: Tensor, state: DecoderState) -> tuple[Tensor, DecoderState]:
        """Return logits_BV at the next position, and the state after it.

        Raises:
            UserError: The position embedding ends before this position.
        """
        x_BD = self.token_embedding(token_B)
        if self.position_embedding is not None:
            if state.position >= self.position_embedding.num_embeddings:
                longest = self.position_embedding.num_embeddings
                raise UserError(f"the model has positions for {longest} tokens (model.seq_len): generate fewer")
            x_BD = x_BD + self.position_embedding.weight[state.position]
        x_BD = self.embedding(x_BD)
        mixers = []
        for block, before in zip(self._blocks(), state.mixers, strict=True):
            x_BD, after = block.step(x_BD, before)
            mixers.append(after)
        logits_BV: Tensor = self.unembed(self.final_norm(self.final_residual(x_BD)))
        return logits_BV, DecoderState(state.position + 1, mixers)

    def _blocks(self) -> list[Block]:
        return [cast(Block, block) for block in self.blocks]


def count_weights(network: nn.Module) -> int:
    """Return the number of parameters that each token is multiplied with: all but those of embeddings."""
    return sum(value.numel() for name, value in network.named_parameters() if "embedding" not in name)


def causal_mask(length: int, device: torch.device) -> Tensor:
    """Return the mask [T, T] that is True where position t must not read position s, s > t."""
    return torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
