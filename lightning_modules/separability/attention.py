"""Causal multi-head attention whose heads can be frozen, swapped and clamped one by one.

Shapes: B batch, T positions, D width, H heads, K head width.
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from lightning_modules.core.decoder import causal_mask

# In an ensemble on a CPU, torch loops over the members inside the operator and warns about the loop. The loop costs
# nothing beside the attention of one member.
warnings.filterwarnings("ignore", ".*batching rule for aten::_scaled_dot_product_flash_attention_for_cpu")

# Fused kernels on a GPU take head widths that fill 16 bytes. Zeros between the matrices of the heads pad the width
# without a launch, since the matrices are concatenated in any case, and add nothing to any product.
ALIGNMENT = 8


class Heads(nn.Module):
    """One matrix per head, each a parameter named by the number of its head."""

    def __init__(self, heads: int, rows: int, columns: int):
        super().__init__()
        self.names = [str(head) for head in range(heads)]
        for name in self.names:
            self.register_parameter(name, nn.Parameter(torch.randn(rows, columns) * columns**-0.5))

    def forward(self) -> list[Tensor]:
        """Return the matrices in the order of the heads."""
        # getattr, because torch.compile in torch 2.11 cannot trace a ParameterList
        return [getattr(self, name) for name in self.names]


@dataclass
class KeyValueCache:
    """Keys and values of the positions that attention has seen, [B, H, T, K]."""

    k_BHTK: Tensor
    v_BHTK: Tensor


class Attention(nn.Module):
    """Causal multi-head attention; the query, key, value and output map of each head is a separate parameter.

    o_T = sum_h O_h sum_s softmax_s(<Q_h x_t, K_h x_s> / sqrt(K)) V_h x_s over s <= t.

    The site `pattern` gives the attention weights, [B, H, T, T]. Rows longer than K run through
    `scaled_dot_product_attention`, which never holds the weights in memory, unless a hook on `pattern` needs them. In
    shorter rows the weights are smaller than the queries, so there is no memory to save.

    Args:
        width: D.
        heads: H; K = D / H.
    """

    site = "attn"
    hidden_KK: Tensor
    zeros_PD: Tensor

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads, self.head_width = heads, width // heads
        shape = self.head_width, width
        self.q_proj, self.k_proj, self.v_proj = (Heads(heads, *shape) for _ in range(3))
        self.o_proj = Heads(heads, *shape[::-1])
        self.pattern = nn.Identity()
        self.scale = self.head_width**-0.5
        hidden_KK = causal_mask(self.head_width, torch.device("cpu"))
        self.register_buffer("hidden_KK", hidden_KK, persistent=False)  # for short rows
        self.register_buffer("zeros_PD", torch.zeros(-self.head_width % ALIGNMENT, width), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the contribution to the residual stream, [B, T, D]."""
        length = x_BTD.shape[1]
        is_short = length <= self.head_width
        if is_short or self.pattern._forward_hooks:
            q_BHTK, k_BHTK, v_BHTK = self._project(x_BTD)
            score_BHTT = (q_BHTK @ k_BHTK.mT) * self.scale
            hidden_TT = self.hidden_KK[:length, :length] if is_short else causal_mask(length, x_BTD.device)
            pattern_BHTT = self.pattern(score_BHTT.masked_fill(hidden_TT, -torch.inf).softmax(-1))
            return self._write(pattern_BHTT.to(v_BHTK.dtype) @ v_BHTK)
        padded = x_BTD.is_cuda
        q_BHTK, k_BHTK, v_BHTK = self._project(x_BTD, padded)
        read_BHTK = scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True, scale=self.scale)
        return self._write(read_BHTK, padded)

    def init_state(self, batch: int) -> KeyValueCache:
        """Return an empty cache."""
        empty_BHTK = self.q_proj()[0].new_empty(batch, self.heads, 0, self.head_width)
        return KeyValueCache(empty_BHTK, empty_BHTK)

    def step(self, x_BD: Tensor, state: KeyValueCache) -> tuple[Tensor, KeyValueCache]:
        """Return the contribution at the next position, [B, D], and the cache with that position."""
        q_BH1K, k_BH1K, v_BH1K = self._project(x_BD[:, None])
        k_BHTK, v_BHTK = torch.cat([state.k_BHTK, k_BH1K], dim=2), torch.cat([state.v_BHTK, v_BH1K], dim=2)
        read_BH1K = scaled_dot_product_attention(q_BH1K, k_BHTK, v_BHTK, scale=self.scale)
        return self._write(read_BH1K)[:, 0], KeyValueCache(k_BHTK, v_BHTK)

    def _project(self, x_BTD: Tensor, padded: bool = False) -> tuple[Tensor, ...]:
        # One product for q, k and v of all heads: 3 H small products would be bound by their launches
        padding = [self.zeros_PD] if padded else []
        matrices = [*self.q_proj(), *self.k_proj(), *self.v_proj()]
        weight = torch.cat([part for matrix in matrices for part in (matrix, *padding)])
        qkv_3BHTK = (x_BTD @ weight.mT).view(*x_BTD.shape[:2], 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return qkv_3BHTK.unbind()

    def _write(self, read_BHTK: Tensor, padded: bool = False) -> Tensor:
        padding = [self.zeros_PD.mT] if padded else []
        weight = torch.cat([part for matrix in self.o_proj() for part in (matrix, *padding)], dim=1)
        output_BTD: Tensor = read_BHTK.transpose(1, 2).flatten(2) @ weight.mT
        return output_BTD
