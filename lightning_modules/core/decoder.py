"""A small decoder-only transformer in which everything that one may intervene on has a name.

Shapes: B batch, T positions, V vocabulary, D width, H heads, K head width, M MLP width.
"""

from typing import Literal

import torch
from torch import Tensor, nn


class Heads(nn.Module):
    """One matrix a head, each a parameter named by the head's number, so that heads can be frozen and swapped apart."""

    def __init__(self, heads: int, rows: int, columns: int):
        super().__init__()
        self.names = [str(head) for head in range(heads)]
        for name in self.names:
            self.register_parameter(name, nn.Parameter(torch.randn(rows, columns) * columns**-0.5))

    def forward(self) -> list[Tensor]:
        """The matrices, in order; torch.compile reads no ParameterList in torch 2.11."""
        return [getattr(self, name) for name in self.names]


class Attention(nn.Module):
    """Causal multi-head attention; every head's query, key, value and output map is a parameter of its own.

    o_T = sum_h O_h sum_s softmax_s(<Q_h x_t, K_h x_s> / sqrt(K)) V_h x_s over s <= t. The weights are the output of the
    site `pattern`, [B, H, T, T]; that they pass through memory is what makes them a site.

    Args:
        seq_len: Longest sequence.
        width: D.
        heads: H; K = D / H.
    """

    def __init__(self, seq_len: int, width: int, heads: int):
        super().__init__()
        shape = width // heads, width
        self.q_proj, self.k_proj, self.v_proj = (Heads(heads, *shape) for _ in range(3))
        self.o_proj = Heads(heads, *shape[::-1])
        self.pattern = nn.Identity()
        self.heads = heads
        self.scale = (width // heads) ** -0.5
        self.register_buffer("hidden_TT", torch.ones(seq_len, seq_len, dtype=torch.bool).triu(1), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return what attention adds to the residual stream, [B, T, D]."""
        batch, length, _ = x_BTD.shape
        # One product for all heads and for q, k and v: three times H small ones would wait for their launches
        weight = torch.cat([*self.q_proj(), *self.k_proj(), *self.v_proj()])
        qkv_3BHTK = (x_BTD @ weight.mT).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q_BHTK, k_BHTK, v_BHTK = qkv_3BHTK.unbind()
        score_BHTT = (q_BHTK @ k_BHTK.mT) * self.scale
        hidden_TT = self.hidden_TT[:length, :length]
        pattern_BHTT = self.pattern(score_BHTT.masked_fill(hidden_TT, -torch.inf).softmax(-1))
        read_BTD = (pattern_BHTT.to(v_BHTK.dtype) @ v_BHTK).transpose(1, 2).flatten(2)
        return read_BTD @ torch.cat(self.o_proj(), dim=1).mT


class MLP(nn.Module):
    """D -> M -> D with a ReLU."""

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.up, self.down = nn.Linear(width, hidden), nn.Linear(hidden, width)
        for layer in (self.up, self.down):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)
            nn.init.zeros_(layer.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return what the MLP adds to the residual stream."""
        return self.down(self.up(x_BTD).relu())


class Block(nn.Module):
    """x + attn(norm(x)), then x + mlp(norm(x)); `mid_residual` and `residual` are the stream after each."""

    def __init__(self, seq_len: int, width: int, heads: int, mlp_width: int, norm: type[nn.Module]):
        super().__init__()
        self.attn_norm, self.attn, self.mid_residual = norm(width), Attention(seq_len, width, heads), nn.Identity()
        self.mlp_norm, self.mlp, self.residual = norm(width), MLP(width, mlp_width), nn.Identity()

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the stream after the block."""
        x_BTD = self.mid_residual(x_BTD + self.attn(self.attn_norm(x_BTD)))
        return self.residual(x_BTD + self.mlp(self.mlp_norm(x_BTD)))


class Decoder(nn.Module):
    """Token and position embeddings, blocks, a final norm, and an unembedding that is not tied.

    Sites: `embedding`, `blocks.<i>.{attn.pattern, attn, mid_residual, mlp, residual}`, `final_residual` (the stream
    that the final norm reads) and `final_norm`. Weights begin as N(0, 1 / fan-in), embeddings as N(0, 1 / D).

    Args:
        vocab_size: V.
        seq_len: Longest sequence, for which there are positions.
        width: D.
        depth: Blocks.
        heads: H, a divisor of D.
        mlp_width: M, 4 D if None.
        norm: `layer` for pre-LN; `none` for no norm anywhere, as grokking was first taken apart.
    """

    def __init__(
        self,
        vocab_size: int,
        seq_len: int,
        width: int,
        depth: int,
        heads: int,
        mlp_width: int | None = None,
        norm: Literal["layer", "none"] = "layer",
    ):
        super().__init__()
        kind = nn.LayerNorm if norm == "layer" else nn.Identity
        self.token_embedding, self.position_embedding = nn.Embedding(vocab_size, width), nn.Embedding(seq_len, width)
        self.embedding = nn.Identity()
        mlp_width = 4 * width if mlp_width is None else mlp_width
        self.blocks = nn.ModuleList(Block(seq_len, width, heads, mlp_width, kind) for _ in range(depth))
        self.final_residual, self.final_norm = nn.Identity(), kind(width)
        self.unembed = nn.Linear(width, vocab_size, bias=False)
        for layer in (self.token_embedding, self.position_embedding, self.unembed):
            nn.init.normal_(layer.weight, std=width**-0.5)

    def forward(self, tokens_BT: Tensor, with_residual: bool = False) -> Tensor | tuple[Tensor, Tensor]:
        """Return logits_BTV, and with them, if asked for, the stream at `final_residual`, [B, T, D]."""
        position_TD = self.position_embedding.weight[: tokens_BT.shape[1]]
        x_BTD = self.embedding(self.token_embedding(tokens_BT) + position_TD)
        for block in self.blocks:
            x_BTD = block(x_BTD)
        x_BTD = self.final_residual(x_BTD)
        logits_BTV = self.unembed(self.final_norm(x_BTD))
        return (logits_BTV, x_BTD) if with_residual else logits_BTV
