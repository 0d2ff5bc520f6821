"""Layers of bridges: how queries read the source, and how a last map starts.

Shapes: B batch, S source positions, Q queries, C and W widths, P parts of a map, F parameters of a part, N = B * heads.
"""

import torch
from torch import Tensor, nn

from lightning_modules.telepathy.orthogonal import orthogonal_


def start_equal(linear: nn.Linear, parts: int) -> None:
    """Give the `parts` equal parts of a map's output the same parameters at the start.

    Parts that start at random divide their work by chance: often two digits of a number fall to one soft token and
    another one carries nothing, which training does not undo. From an equal start the target decides.
    """
    for parameter in (linear.weight, linear.bias):
        parts_PF = parameter.data.view(parts, -1)
        parts_PF.copy_(parts_PF[:1].clone().expand_as(parts_PF))


def shared_memory(memory_BSC: Tensor) -> Tensor:
    """Return states that all maps of keys and values read as they are, position by position in memory.

    `MultiheadAttention` puts positions first, and autocast rounds. Each map would make a copy and keep it for backward.
    """
    kind = memory_BSC.device.type
    if torch.is_autocast_enabled(kind):
        memory_BSC = memory_BSC.to(torch.get_autocast_dtype(kind))
    return memory_BSC.transpose(0, 1).contiguous().transpose(0, 1)


class ReadLayer(nn.Module):
    """Cross-attention of queries to the source and an MLP, each with a LayerNorm before it and a residual around it.

    Args:
        width: Width of the queries.
        source_dim: Width of the source states.
        heads: Number of attention heads.
        sound: Start with orthogonal maps between what is read and the queries, and with an MLP that adds nothing. A
            product of random square matrices loses most directions of a narrow state; a product of orthogonal ones
            loses none (Saxe et al. 2014).
    """

    def __init__(self, width: int, source_dim: int, heads: int, sound: bool):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, heads, kdim=source_dim, vdim=source_dim, batch_first=True)
        last = nn.Linear(4 * width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), last)
        if sound:
            together = self.attention.in_proj_weight  # of queries, keys and values; None where the widths differ
            orthogonal_(self.attention.v_proj_weight if together is None else together.data[2 * width :])
            orthogonal_(self.attention.out_proj.weight)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, read_BQC: Tensor, memory_BSC: Tensor, bias_NQS: Tensor) -> Tensor:
        """Return the queries read_BQC with what they read; N = B * heads."""
        query_BQC = self.norm(read_BQC)
        added_BQC, _ = self.attention(query_BQC, memory_BSC, memory_BSC, attn_mask=bias_NQS, need_weights=False)
        read_BQC = read_BQC + added_BQC
        mixed_BQC: Tensor = read_BQC + self.mlp(read_BQC)
        return mixed_BQC


class FlowLayer(nn.Module):
    """A layer of a diffusion transformer (Peebles and Xie 2023), with cross-attention to the source if it has any.

    Self-attention and MLP are scaled and gated by the condition; their gates start at 0, so the layer starts as its
    cross-attention alone.

    Args:
        width: W.
        heads: Number of attention heads.
        crosses: Whether it has cross-attention.
        sound: Start cross-attention with orthogonal maps between what is read and the queries, see `ReadLayer`.
    """

    def __init__(self, width: int, heads: int, crosses: bool, sound: bool):
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.own = nn.MultiheadAttention(width, heads, batch_first=True)
        self.cross = nn.MultiheadAttention(width, heads, batch_first=True) if crosses else None
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        last = nn.Linear(width, 6 * width)
        self.condition = nn.Sequential(nn.SiLU(), last)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        if self.cross is not None and sound:
            orthogonal_(self.cross.in_proj_weight.data[2 * width :])
            orthogonal_(self.cross.out_proj.weight)

    def forward(
        self, x_BQW: Tensor, condition_BW: Tensor, memory_BSW: Tensor, bias_NQS: Tensor, hole_BQ: Tensor
    ) -> Tensor:
        """Return x_BQW; queries at holes are read by no other one."""
        shift_B1W, scale_B1W, gate_B1W, *of_mlp = self.condition(condition_BW)[:, None].chunk(6, dim=-1)
        read_BQW = self.norms[0](x_BQW) * (1 + scale_B1W) + shift_B1W
        x_BQW = (
            x_BQW + gate_B1W * self.own(read_BQW, read_BQW, read_BQW, key_padding_mask=hole_BQ, need_weights=False)[0]
        )
        if self.cross is not None:
            read_BQW = self.norms[1](x_BQW)
            x_BQW = x_BQW + self.cross(read_BQW, memory_BSW, memory_BSW, attn_mask=bias_NQS, need_weights=False)[0]
        shift_B1W, scale_B1W, gate_B1W = of_mlp
        mixed_BQW: Tensor = x_BQW + gate_B1W * self.mlp(self.norms[2](x_BQW) * (1 + scale_B1W) + shift_B1W)
        return mixed_BQW
