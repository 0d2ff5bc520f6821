"""A bridge that samples soft tokens: a diffusion transformer with rectified flow in the target's embedding space.

Shapes: B batch, S source positions, C source width, Q queries, K soft tokens, D target width, W width of the layers,
N = B * heads.
"""

import math
from typing import Literal

import torch
from torch import Tensor, nn

from datamodules.errors import SIZE, UserError, check_numbers
from lightning_modules.telepathy.averages import masked_mean, row_mean
from lightning_modules.telepathy.bridge_layers import FlowLayer, start_equal
from lightning_modules.telepathy.bridges import Bridge, HasWidth
from lightning_modules.telepathy.noise import gaussian, mixed, uniform
from lightning_modules.telepathy.orthogonal import orthogonal_
from lightning_modules.telepathy.places import SLOPE, place_bias, places

Conditioning = Literal["pooled", "cross", "hybrid"]
SLOWEST, RATES = 0.1, 4.0  # waves of the time: periods from about 60 down by a factor of e^4 and more


class FlowBridge(Bridge):
    """Soft tokens that flow from noise to embeddings of a text, under the condition of the source (Liu et al. 2023).

    The path from noise x_0 to embeddings x_1 is x_t = t x_1 + (1 - t) x_0, and a transformer learns its velocity
    x_1 - x_0 (objective `flow`) in the form (y - x_t) / (1 - t), where y is its output: the end of the path as it
    expects it. So it has to add nothing of the noise to its output, and the last step of sampling ends at y. Sampling
    integrates the velocity from t = 0 in equal steps of Euler's method. Objectives on soft tokens train the same
    parameters, through the last step alone (DRaFT-1, Clark et al. 2024): gradients through all steps cost as many times
    the work. Embeddings and noise both have the scale 1; `model.output` brings soft tokens to the scale of the target.

    Each query makes the soft tokens of one source position, and the flow takes them to the embeddings of the target
    tokens that begin within that source token (`alignment.aligned`). A source token is one to four target tokens: the
    k-th embedding of a text lies several source tokens away from the place of the k-th soft token, and such a target
    makes the bridge worse than none.

    Noise depends on the question alone (`row_seeds`), in training also on a number that is drawn for each step. So an
    evaluation gives the same soft tokens in any batch and on any rank.

    Args:
        source: The source, with states of width C.
        target: The target, with soft tokens of width D.
        key_norm: Use LayerNorm on the source states, a bias of attention towards the place of a query, the start of
            `ReadLayer`, and the form of the velocity above. In the notes the output was the velocity, noise and all.
        soft_tokens: K, the most soft tokens of a question. Those behind the question are left out.
        tokens_per_query: Soft tokens per query. The queries are spread evenly over `span` source positions.
        span: Source positions: about the length of the longest question.
        conditioning: `pooled`: the mean of the source states enters each layer's scales and gates. `cross`: each layer
            attends over the source states. `hybrid`: both.
        steps: Euler steps of sampling.
        width: W.
        hidden: Width of the hidden layer of the output MLP, which has to know all source tokens; 4 `width` if None.
        depth: Number of layers.
        heads: Number of attention heads.

    Raises:
        UserError: A size is out of range, or the sizes do not fit each other.
    """

    samples = True

    def __init__(
        self,
        source: HasWidth,
        target: HasWidth,
        key_norm: bool = True,
        soft_tokens: int = 90,
        tokens_per_query: int = 1,
        span: int = 30,
        conditioning: Conditioning = "cross",
        steps: int = 8,
        width: int = 128,
        hidden: int | None = None,
        depth: int = 2,
        heads: int = 4,
    ):
        super().__init__()
        sizes = {"soft_tokens": soft_tokens, "span": span, "steps": steps, "width": width, "depth": depth}
        check_numbers("model.bridge", 1, SIZE, **sizes, heads=heads, tokens_per_query=tokens_per_query, hidden=hidden)
        if width % heads or width % 2:
            raise UserError(f"model.bridge: width {width} is odd or not divisible by {heads} heads")
        if soft_tokens % tokens_per_query:
            raise UserError(f"model.bridge: {soft_tokens} soft tokens do not divide into {tokens_per_query} per query")
        self.soft_tokens, self.span, self.steps, self.heads = soft_tokens, span, steps, heads
        self.count, self.tokens_per_query, self.width = soft_tokens, tokens_per_query, target.width
        self.conditioning, self.is_sound = conditioning, key_norm
        self.norm = nn.LayerNorm(source.width) if key_norm else nn.Identity()
        self.memory, self.pool = nn.Linear(source.width, width), nn.Linear(source.width, width)
        if key_norm:
            orthogonal_(self.memory.weight)
        features = tokens_per_query * target.width  # of a query
        self.into = nn.Linear(features, width)
        self.place_QW = nn.Parameter(0.1 * torch.randn(soft_tokens // tokens_per_query, width))
        self.time = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, width))
        crosses = conditioning != "pooled"
        self.layers = nn.ModuleList(FlowLayer(width, heads, crosses, key_norm) for _ in range(depth))
        hidden = hidden or 4 * width
        last = nn.Linear(hidden, features)
        start_equal(last, tokens_per_query)
        self.out = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), last)
        self.memory.requires_grad_(crosses)
        self.pool.requires_grad_(conditioning != "cross")

    def soft_mask(self, mask_BS: Tensor) -> Tensor:
        """Return mask_BK: the soft tokens of queries whose place lies within the question."""
        return self._query_mask(mask_BS).repeat_interleave(self.tokens_per_query, dim=1)

    def forward(self, states_BSC: Tensor, mask_BS: Tensor, seed_B: Tensor | None = None) -> Tensor:
        """Return sampled soft_BKD; without seeds, the noise is that of the seed 0."""
        seed_B = states_BSC.new_zeros(len(states_BSC), dtype=torch.long) if seed_B is None else seed_B
        source = self._conditions(states_BSC, mask_BS)
        x_BKD, trains = self._noise(seed_B), torch.is_grad_enabled()
        for step in range(self.steps):
            time_B = x_BKD.new_full((len(x_BKD),), step / self.steps)
            with torch.set_grad_enabled(trains and step == self.steps - 1):
                x_BKD = x_BKD + self._velocity(x_BKD, time_B, *source) / self.steps
        return x_BKD

    def flow_loss(
        self, states_BSC: Tensor, mask_BS: Tensor, seed_B: Tensor, text_BKD: Tensor, text_mask_BK: Tensor
    ) -> Tensor:
        """Return the mean square error of the velocity at a time of each row, over the soft tokens that have a target.

        Times are drawn up to that of the last step of sampling, 1 - 1 / steps.

        Args:
            states_BSC: Source states.
            mask_BS: True at real source positions.
            seed_B: Seeds of the rows.
            text_BKD: Embeddings at the scale 1, one for each soft token; those after the last soft token are left out.
            text_mask_BK: True at real embeddings.
        """
        missing = max(self.count - text_BKD.shape[1], 0)
        x1_BKD = nn.functional.pad(text_BKD * text_mask_BK[..., None], (0, 0, 0, missing))[:, : self.count]
        real_BK = nn.functional.pad(text_mask_BK, (0, missing))[:, : self.count] & self.soft_mask(mask_BS)
        time_B, x0_BKD = uniform(mixed(seed_B), 1)[:, 0] * (1 - 1 / self.steps), self._noise(seed_B)
        x_BKD = x0_BKD + time_B[:, None, None] * (x1_BKD - x0_BKD)
        velocity_BKD = self._velocity(x_BKD, time_B, *self._conditions(states_BSC, mask_BS))
        return row_mean((velocity_BKD - (x1_BKD - x0_BKD)).square().mean(-1), real_BK)

    def positions(self) -> Tensor:
        """Return the source position of each soft token, position_K."""
        return self._places(torch.device("cpu")).repeat_interleave(self.tokens_per_query)

    def _places(self, device: torch.device) -> Tensor:
        """Return the source position of each query."""
        return places(len(self.place_QW), self.span, device)

    def _query_mask(self, mask_BS: Tensor) -> Tensor:
        return (self._places(mask_BS.device) < mask_BS.sum(1, keepdim=True)) | (not self.is_sound)

    def _noise(self, seed_B: Tensor) -> Tensor:
        return gaussian(seed_B, self.count * self.width).view(-1, self.count, self.width)

    def _conditions(self, states_BSC: Tensor, mask_BS: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return what all steps read of the source: pooled_BW, memory_BSW, the bias of attention, holes among Q."""
        states_BSC = self.norm(states_BSC)
        pooled_BW = self.pool(masked_mean(states_BSC, mask_BS)) * (self.conditioning != "cross")
        slope = SLOPE * min(len(self.place_QW) / self.span, 1.0) * self.is_sound
        bias_NQS = place_bias(self._places(mask_BS.device), mask_BS, slope, self.heads)
        return pooled_BW, self.memory(states_BSC), bias_NQS, ~self._query_mask(mask_BS)

    def _velocity(
        self, x_BKD: Tensor, time_B: Tensor, pooled_BW: Tensor, memory_BSW: Tensor, bias_NQS: Tensor, hole_BQ: Tensor
    ) -> Tensor:
        half = self.place_QW.shape[1] // 2
        rate_H = torch.exp(torch.linspace(math.log(SLOWEST), RATES, half, device=x_BKD.device))
        angle_BH = time_B[:, None] * rate_H
        condition_BW = self.time(torch.cat([angle_BH.sin(), angle_BH.cos()], dim=1)) + pooled_BW
        x_BQW = self.into(x_BKD.reshape(len(x_BKD), len(self.place_QW), -1)) + self.place_QW
        for layer in self.layers:
            x_BQW = layer(x_BQW, condition_BW, memory_BSW, bias_NQS, hole_BQ)
        end_BKD: Tensor = self.out(x_BQW).unflatten(-1, (self.tokens_per_query, -1)).flatten(1, 2)
        return (end_BKD - x_BKD) / (1 - time_B[:, None, None]) if self.is_sound else end_BKD
