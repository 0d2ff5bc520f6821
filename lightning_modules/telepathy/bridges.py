"""Bridges: from a source model's hidden states to soft tokens in a target model's embedding space.

Shapes: B batch, S source positions, C source width, K soft tokens, D target width, R soft tokens a source token.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn


class Bridge(nn.Module, ABC):
    """What every bridge is: `forward(states_BSC, mask_BS) -> soft_BKD`, and `soft_mask` for which of them are real."""

    @abstractmethod
    def forward(self, states_BSC: Tensor, mask_BS: Tensor) -> Tensor:
        """Return the soft tokens."""

    @abstractmethod
    def soft_mask(self, mask_BS: Tensor) -> Tensor:
        """Return mask_BK of the soft tokens that a source mask leads to; needs no states, so it runs in the loader."""


LOCALITY = 2.0  # factor on the initial query and key weights of cross-attention: a window of about one position
BridgeFactory = Callable[[int, int, bool], Bridge]  # (source width, target width, LayerNorm on the source states)


def sinusoids(length: int, width: int, longest: float = 64.0) -> Tensor:
    """Return position encodings_SC: sines and cosines at frequencies from π down to π / `longest`.

    As Vaswani et al. (2017), but with periods as short as two positions and as long as a question, for neighbours have
    to be told apart from the first step on.
    """
    position_S1 = torch.arange(length)[:, None]
    frequency_C = math.pi * torch.exp(torch.arange(0, width, 2) * (-math.log(longest) / width))
    angle_SC = position_S1 * frequency_C
    return torch.stack([angle_SC.sin(), angle_SC.cos()], dim=-1).flatten(1)[:, :width]


class PerceiverLayer(nn.Module):
    """Cross-attention to the source, self-attention among the soft tokens, an MLP; pre-norm, each with its residual.

    Positions enter queries and keys, never values (as in DETR, Carion et al. 2020), so that soft tokens carry what the
    source says and not where they stand.

    Args:
        width: C.
        heads: Attention heads.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.cross_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.self_attention = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross_norm, self.self_norm, self.mlp_norm = (nn.LayerNorm(width) for _ in range(3))
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        # Keys projected as queries are: attention starts as likeness of position, so that soft token k reads about
        # position k from the first step on, rather than having to find it
        weight = self.cross_attention.in_proj_weight.data
        weight[:width] *= LOCALITY
        weight[width : 2 * width] = weight[:width]

    def forward(
        self, soft_BKC: Tensor, position_KC: Tensor, memory_BSC: Tensor, keys_BSC: Tensor, mask_BS: Tensor
    ) -> Tensor:
        """Return soft_BKC after the layer."""
        query_BKC = self.cross_norm(soft_BKC) + position_KC
        read_BKC, _ = self.cross_attention(
            query_BKC, keys_BSC, memory_BSC, key_padding_mask=~mask_BS, need_weights=False
        )
        soft_BKC = soft_BKC + read_BKC
        norm_BKC = self.self_norm(soft_BKC)
        query_BKC = norm_BKC + position_KC
        soft_BKC = soft_BKC + self.self_attention(query_BKC, query_BKC, norm_BKC, need_weights=False)[0]
        return soft_BKC + self.mlp(self.mlp_norm(soft_BKC))


class PerceiverBridge(Bridge):
    """K learned queries that read the source states by cross-attention (Perceiver resampler, Alayrac et al. 2022).

    Args:
        source_dim: Width of the source states.
        target_dim: Width of the soft tokens.
        key_norm: LayerNorm on the states before keys and values are made, and their positions in the keys. Without,
            states of embedding scale give uniform attention, and every input the same soft tokens: the notes' collapse.
        soft_tokens: K, at most `max_length`.
        depth: Layers.
        heads: Attention heads.
        width: Width inside; the target's if None.
        max_length: Longest source.
    """

    def __init__(
        self,
        source_dim: int,
        target_dim: int,
        key_norm: bool = True,
        soft_tokens: int = 32,
        depth: int = 2,
        heads: int = 4,
        width: int | None = None,
        max_length: int = 2048,
    ):
        super().__init__()
        width = width or target_dim
        if soft_tokens < 1 or depth < 1:
            raise ValueError(f"a bridge needs at least 1 soft token and 1 layer, not {soft_tokens} and {depth}")
        if soft_tokens > max_length:
            raise ValueError(f"the bridge has {soft_tokens} soft tokens, more than its max_length of {max_length}")
        if width % heads:
            raise ValueError(f"the bridge's width {width} is not divisible by its {heads} heads")
        self.soft_tokens = soft_tokens
        self.norm = nn.LayerNorm(source_dim) if key_norm else nn.Identity()
        self.project = nn.Linear(source_dim, width)
        positions_SC = sinusoids(max_length, width) if key_norm else torch.zeros(max_length, width)
        self.register_buffer("positions_SC", positions_SC, persistent=False)
        self.positions_KC = nn.Parameter(
            positions_SC[:soft_tokens].clone() if key_norm else torch.randn(soft_tokens, width)
        )
        self.queries_KC = nn.Parameter(torch.zeros(soft_tokens, width))
        self.layers = nn.ModuleList(PerceiverLayer(width, heads) for _ in range(depth))
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, target_dim))

    def forward(self, states_BSC: Tensor, mask_BS: Tensor) -> Tensor:
        """Return the soft tokens."""
        memory_BSC = self.project(self.norm(states_BSC))
        keys_BSC = memory_BSC + self.positions_SC[: memory_BSC.shape[1]]
        soft_BKC = self.queries_KC.expand(len(states_BSC), -1, -1)
        for layer in self.layers:
            soft_BKC = layer(soft_BKC, self.positions_KC, memory_BSC, keys_BSC, mask_BS)
        return self.out(soft_BKC)

    def soft_mask(self, mask_BS: Tensor) -> Tensor:
        """All K, whatever the source's length."""
        return mask_BS.new_ones(len(mask_BS), self.soft_tokens)


class TokenBridge(Bridge):
    """R soft tokens for each source token, by one map that all positions share, and a learned end vector.

    Args:
        source_dim: Width of the source states (the sum, where several layers are concatenated).
        target_dim: Width of the soft tokens.
        key_norm: LayerNorm on the states.
        tokens_per_source: R.
        hidden: Width of an MLP's hidden layer; a linear map if None.
    """

    def __init__(
        self,
        source_dim: int,
        target_dim: int,
        key_norm: bool = True,
        tokens_per_source: int = 2,
        hidden: int | None = None,
    ):
        super().__init__()
        if tokens_per_source < 1:
            raise ValueError(f"a bridge needs at least 1 soft token a source token, not {tokens_per_source}")
        self.tokens_per_source, self.target_dim = tokens_per_source, target_dim
        self.norm = nn.LayerNorm(source_dim) if key_norm else nn.Identity()
        out = tokens_per_source * target_dim
        if hidden is None:
            self.map = nn.Linear(source_dim, out)
        else:
            self.map = nn.Sequential(nn.Linear(source_dim, hidden), nn.GELU(), nn.Linear(hidden, out))
        self.end_D = nn.Parameter(torch.randn(target_dim))

    def forward(self, states_BSC: Tensor, mask_BS: Tensor) -> Tensor:
        """Return the soft tokens, the end vector last."""
        soft_BKD = (
            self.map(self.norm(states_BSC)).unflatten(-1, (self.tokens_per_source, self.target_dim)).flatten(1, 2)
        )
        return torch.cat([soft_BKD, self.end_D.expand(len(soft_BKD), 1, -1)], dim=1)

    def soft_mask(self, mask_BS: Tensor) -> Tensor:
        """R for each real source token, and the end vector."""
        mask_BK = mask_BS.repeat_interleave(self.tokens_per_source, dim=1)
        return torch.cat([mask_BK, mask_BS.new_ones(len(mask_BS), 1)], dim=1)


class OutputScale(nn.Module):
    """Bring soft tokens to the scale of the target's embeddings, with a learned factor.

    `rms`: x / rms(x) · s; `tanh`: tanh(x) · s; `none`: x · s. s starts at the root mean square of the embeddings.

    Args:
        mode: Which.
        scale: Where s starts.
    """

    def __init__(self, mode: Literal["rms", "tanh", "none"], scale: float):
        super().__init__()
        self.mode = mode
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, soft_BKD: Tensor, mask_BK: Tensor) -> Tensor:
        """Return the scaled soft tokens, zero where the mask says there is none."""
        soft_BKD = soft_BKD.float()
        match self.mode:
            case "rms":
                soft_BKD = nn.functional.rms_norm(soft_BKD, soft_BKD.shape[-1:], eps=1e-8)
            case "tanh":
                soft_BKD = soft_BKD.tanh()
        return soft_BKD * self.scale * mask_BK[..., None]
