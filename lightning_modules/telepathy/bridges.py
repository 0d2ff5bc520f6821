"""Bridges: from the hidden states of a source model to soft tokens in the embedding space of a target model.

Shapes: B batch, S source positions, C width of the source states, Q queries, K soft tokens, D target width.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn

from datamodules.errors import SIZE, UserError, check_numbers
from lightning_modules.telepathy.bridge_layers import ReadLayer, shared_memory, start_equal
from lightning_modules.telepathy.places import SLOPE, place_bias, places
from lightning_modules.telepathy.source import Source
from lightning_modules.telepathy.target import Target

SMALL = 0.05  # of the weights of a last map at the start


class HasWidth(Protocol):
    """A source or target, as far as most bridges need it."""

    @property
    def width(self) -> int:
        """Number of features of its vectors."""
        ...


class Bridge(nn.Module, ABC):
    """A map from source states to soft tokens.

    A bridge is made for a source and a target, and may ask them for another kind of states and of soft tokens than
    hidden states and embeddings (`KVBridge`).

    Attributes:
        soft_tokens: K, where every input has the same number of soft tokens; None where it depends on the input.
        samples: Whether soft tokens depend on noise; `forward` then also takes seed_B, a seed of each row.
        embeds: Whether soft tokens lie in the space of the target's embeddings.
    """

    soft_tokens: int | None = None
    samples: bool = False
    embeds: bool = True

    @abstractmethod
    def forward(self, states_BSC: Tensor, mask_BS: Tensor) -> Tensor:
        """Return soft_BKD.

        Args:
            states_BSC: Source states.
            mask_BS: True at real source positions.
        """

    @abstractmethod
    def soft_mask(self, mask_BS: Tensor) -> Tensor:
        """Return mask_BK, True at real soft tokens. It depends on the source mask alone, so the loader can call it."""


BridgeFactory = Callable[[Source, Target, bool], Bridge]  # the last: LayerNorm on the source states


class PerceiverBridge(Bridge):
    """K soft tokens from learned queries that read the source by cross-attention (Perceiver, Alayrac et al. 2022).

    Query q reads around a position c_q of the source: its attention has the fixed bias -a |c_q - s| (ALiBi, Press et
    al. 2022), and the c_q are spread evenly over `span` positions. So a query does not have to learn first which
    positions to read, as it would with positions inside the keys. There is no self-attention among the queries, which
    adds noise at the start: the target itself attends over all soft tokens. The soft tokens of a query start equal
    (`start_equal`), from small weights of the last map: soft tokens are normalised, so the size of its weights sets how
    far a step turns them and nothing else. A slow start costs some seeds a tenth of the accuracy. A query that lies
    behind the question has nothing of its own to read, and its soft tokens are left out.

    Args:
        source: The source, with states of width C.
        target: The target, with soft tokens of width D.
        key_norm: Use LayerNorm on keys and values, the bias towards c_q, and the start of `ReadLayer`. Without these,
            states at the scale of embeddings give uniform attention and the same soft tokens for every input, which is
            the collapse in the notes.
        soft_tokens: K, the most soft tokens of a question.
        tokens_per_query: Soft tokens per query, each by its own map. A number that is one source token is several
            tokens to a target that reads single digits.
        depth: Number of layers. Each has cross-attention and an MLP.
        heads: Number of attention heads.
        width: Width of the layers; D if None.
        hidden: Width of the hidden layer of the output MLP, which has to know all source tokens; 4 `width` if None.
        span: Source positions over which the c_q are spread: about the length of the longest question.

    Raises:
        UserError: A size is out of range, or the sizes do not fit each other.
    """

    def __init__(
        self,
        source: HasWidth,
        target: HasWidth,
        key_norm: bool = True,
        soft_tokens: int = 32,
        tokens_per_query: int = 1,
        depth: int = 1,
        heads: int = 4,
        width: int | None = None,
        hidden: int | None = None,
        span: int = 32,
    ):
        super().__init__()
        sizes = {"soft_tokens": soft_tokens, "tokens_per_query": tokens_per_query, "depth": depth, "heads": heads}
        check_numbers("model.bridge", 1, SIZE, **sizes, width=width, hidden=hidden, span=span)
        width = width or target.width
        hidden = hidden or 4 * width
        if width % heads:
            raise UserError(f"model.bridge: width {width} is not divisible by {heads} heads")
        if soft_tokens % tokens_per_query:
            raise UserError(f"model.bridge: {soft_tokens} soft tokens do not divide into {tokens_per_query} per query")
        queries = soft_tokens // tokens_per_query
        self.soft_tokens, self.tokens_per_query, self.heads = soft_tokens, tokens_per_query, heads
        self.norm = nn.LayerNorm(source.width) if key_norm else nn.Identity()
        self.queries_QC = nn.Parameter(torch.randn(queries, width) * (0.1 if key_norm else 1.0))
        self.span, self.has_places = span, key_norm
        self.slope = SLOPE * min(queries / span, 1.0) if key_norm else 0.0
        self.layers = nn.ModuleList(ReadLayer(width, source.width, heads, key_norm) for _ in range(depth))
        last = nn.Linear(hidden, tokens_per_query * target.width)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), last)
        start_equal(last, tokens_per_query)
        if key_norm:
            last.weight.data *= SMALL

    def forward(self, states_BSC: Tensor, mask_BS: Tensor) -> Tensor:
        """Return soft_BKD."""
        memory_BSC = shared_memory(self.norm(states_BSC))
        bias_NQS = place_bias(self._places(mask_BS.device), mask_BS, self.slope, self.heads)
        read_BQC = self.queries_QC.expand(len(states_BSC), -1, -1)
        for layer in self.layers:
            read_BQC = layer(read_BQC, memory_BSC, bias_NQS)
        soft_BKD: Tensor = self.out(read_BQC).unflatten(-1, (self.tokens_per_query, -1)).flatten(1, 2)
        return soft_BKD

    def soft_mask(self, mask_BS: Tensor) -> Tensor:
        """Return mask_BK: the soft tokens of queries whose position lies within the question."""
        within_BQ = self._places(mask_BS.device) < mask_BS.sum(1, keepdim=True)
        return (within_BQ | (not self.has_places)).repeat_interleave(self.tokens_per_query, dim=1)

    def _places(self, device: torch.device) -> Tensor:
        """Return the c_q as place_Q."""
        return places(len(self.queries_QC), self.span, device)


class TokenBridge(Bridge):
    """A fixed number of soft tokens per source token, by one map that all positions share, and a learned end vector.

    The soft tokens of a source token start equal (`start_equal`).

    Args:
        source: The source, with states of width C, the sum over layers where several are concatenated.
        target: The target, with soft tokens of width D.
        key_norm: Use LayerNorm on the states.
        tokens_per_source: Soft tokens per source token.
        hidden: Width of the hidden layer of an MLP; a linear map if None.

    Raises:
        UserError: A size is out of range.
    """

    def __init__(
        self,
        source: HasWidth,
        target: HasWidth,
        key_norm: bool = True,
        tokens_per_source: int = 2,
        hidden: int | None = None,
    ):
        super().__init__()
        check_numbers("model.bridge", 1, SIZE, tokens_per_source=tokens_per_source, hidden=hidden)
        self.tokens_per_source, self.target_dim = tokens_per_source, target.width
        self.norm = nn.LayerNorm(source.width) if key_norm else nn.Identity()
        out = tokens_per_source * target.width
        last = nn.Linear(hidden or source.width, out)
        self.map = last if hidden is None else nn.Sequential(nn.Linear(source.width, hidden), nn.GELU(), last)
        start_equal(last, tokens_per_source)
        self.end_D = nn.Parameter(torch.randn(target.width))

    def forward(self, states_BSC: Tensor, mask_BS: Tensor) -> Tensor:
        """Return soft_BKD, the end vector last."""
        soft_BKD = (
            self.map(self.norm(states_BSC)).unflatten(-1, (self.tokens_per_source, self.target_dim)).flatten(1, 2)
        )
        return torch.cat([soft_BKD, self.end_D.expand(len(soft_BKD), 1, -1)], dim=1)

    def soft_mask(self, mask_BS: Tensor) -> Tensor:
        """Return mask_BK: the soft tokens of real source tokens, and the end vector."""
        mask_BK = mask_BS.repeat_interleave(self.tokens_per_source, dim=1)
        return torch.cat([mask_BK, mask_BS.new_ones(len(mask_BS), 1)], dim=1)
