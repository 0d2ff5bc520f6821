"""Bridges: from a source model's hidden states to soft tokens in a target model's embedding space.

Shapes: B batch, S source positions, C source width, Q queries, K soft tokens, D target width, R soft tokens of a source
token.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor, nn

from datamodules.errors import UserError


class Bridge(nn.Module, ABC):
    """What every bridge is: `forward(states_BSC, mask_BS) -> soft_BKD`, and `soft_mask` for which of them are real."""

    @abstractmethod
    def forward(self, states_BSC: Tensor, mask_BS: Tensor) -> Tensor:
        """Return the soft tokens."""

    @abstractmethod
    def soft_mask(self, mask_BS: Tensor) -> Tensor:
        """Return mask_BK of the soft tokens that a source mask leads to; needs no states, so it runs in the loader."""


SLOPE = 4.0  # of attention over distance at the start: nearly all of it on the nearest token
BridgeFactory = Callable[[int, int, bool], Bridge]  # (source width, target width, LayerNorm on the source states)


class PerceiverBridge(Bridge):
    """K learned queries that read the source states by cross-attention (Perceiver resampler, Alayrac et al. 2022).

    Query q reads around a place c_q of the source: its attention has the fixed bias -a |c_q - s| (ALiBi, Press et al.
    2022), with the places evenly over `span`. So it need not first find out where to look, which positions inside keys
    would leave it to do.

    Args:
        source_dim: Width of the source states.
        target_dim: Width of the soft tokens.
        key_norm: LayerNorm on keys and values, places to read at and orthogonal maps at the start. Without, states of
            embedding scale give uniform attention, and every input the same soft tokens: the notes' collapse.
        soft_tokens: K.
        tokens_per_query: Soft tokens that a query makes of what it read, each by a map of its own: a number that is one
            source token is several digits to a target that reads digits.
        depth: Layers, each self-attention among the queries, cross-attention and an MLP.
        heads: Attention heads.
        width: Width inside; the target's if None.
        span: Source tokens that the places are spread over: about the longest question.
    """

    def __init__(
        self,
        source_dim: int,
        target_dim: int,
        key_norm: bool = True,
        soft_tokens: int = 32,
        tokens_per_query: int = 1,
        depth: int = 2,
        heads: int = 4,
        width: int | None = None,
        span: int = 32,
    ):
        super().__init__()
        width = width or target_dim
        if soft_tokens < 1 or depth < 1:
            raise UserError(f"a bridge needs at least 1 soft token and 1 layer, not {soft_tokens} and {depth}")
        if width % heads:
            raise UserError(f"the bridge's width {width} is not divisible by its {heads} heads")
        if tokens_per_query < 1 or soft_tokens % tokens_per_query:
            raise UserError(f"{soft_tokens} soft tokens cannot be made {tokens_per_query} a query")
        queries = soft_tokens // tokens_per_query
        self.soft_tokens, self.tokens_per_query, self.heads = soft_tokens, tokens_per_query, heads
        self.project = nn.Linear(source_dim, width, bias=not key_norm)  # before a norm, a bias would drown small states
        self.norm = nn.LayerNorm(width) if key_norm else nn.Identity()
        self.queries_QC = nn.Parameter(torch.randn(queries, width) * (0.1 if key_norm else 1.0))
        places_Q = torch.arange(queries) * span // queries  # whole numbers: several may share a source token
        self.register_buffer("places_Q", places_Q, persistent=False)
        self.slope = SLOPE * min(queries / span, 1.0) if key_norm else 0.0
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(
                width, heads, 4 * width, dropout=0.0, activation="gelu", batch_first=True, norm_first=True
            )
            for _ in range(depth)
        )
        self.out = nn.Sequential(
            nn.LayerNorm(width),
            nn.Linear(width, 4 * width),
            nn.GELU(),
            nn.Linear(4 * width, tokens_per_query * target_dim),
        )
        if key_norm:
            self._keep_directions()

    def _keep_directions(self) -> None:
        """Start from orthogonal maps on the way of what is read.

        What tells thousands of tokens apart lies in all directions of a narrow state; a product of random square
        matrices all but loses most of them, and orthogonal ones lose none (Saxe et al. 2014).
        """
        width = self.project.out_features
        nn.init.orthogonal_(self.project.weight)
        for layer in self.layers:
            nn.init.orthogonal_(layer.multihead_attn.in_proj_weight.data[2 * width :])
            nn.init.orthogonal_(layer.multihead_attn.out_proj.weight)

    def forward(self, states_BSC: Tensor, mask_BS: Tensor) -> Tensor:
        """Return the soft tokens."""
        memory_BSC = self.norm(self.project(states_BSC))
        position_S = torch.arange(mask_BS.shape[1], device=mask_BS.device)
        bias_QS = -self.slope * (self.places_Q[:, None] - position_S).abs()
        bias_BQS = bias_QS.masked_fill(~mask_BS[:, None], -torch.inf)
        soft_BQC = self.queries_QC.expand(len(states_BSC), -1, -1)
        for layer in self.layers:
            soft_BQC = layer(soft_BQC, memory_BSC, memory_mask=bias_BQS.repeat_interleave(self.heads, dim=0))
        return self.out(soft_BQC).unflatten(-1, (self.tokens_per_query, -1)).flatten(1, 2)

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
            raise UserError(f"a bridge needs at least 1 soft token a source token, not {tokens_per_source}")
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
