"""The mixer `gated_delta`: a recurrence that writes values under keys into a state by the gated delta rule.

Shapes: B batch, T positions, D width, H heads, K key width, V value width, C channels, P a convolution's past.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from lightning_modules.mixers.convolution import ShortConvolution
from lightning_modules.mixers.gates import Gates, InitialGates
from lightning_modules.mixers.keys import KeyPlaces
from lightning_modules.mixers.recall import Recall
from lightning_modules.mixers.rule import run_rule
from lightning_modules.mixers.writes import Writes


@dataclass
class DeltaState:
    """What the mixer carries from one position to the next; its size does not grow.

    Attributes:
        position: Positions seen.
        pasts_BPC: Last inputs of the convolutions of queries, keys and values.
        last_k_B1HK: Key of the last position.
        last_beta_B1H: Writing strength of the last position.
        memory_BHKV: S.
        seen_B: Markers that have had a key of the bank.
    """

    position: int
    pasts_BPC: tuple[Tensor, Tensor, Tensor]
    last_k_B1HK: Tensor
    last_beta_B1H: Tensor
    memory_BHKV: Tensor
    seen_B: Tensor


class GatedDelta(nn.Module):
    """S <- exp(g_t) S; S <- S + beta_t k_t (v_t - S^T k_t)^T; o_t = S^T q_t / sqrt(K), in each head.

    q, k and v pass a short convolution with SiLU, then q and k are divided by their norms. The output is
    o_proj(RMSNorm(o) * silu(gate_proj(x))). `Gates` gives g and beta. The projections of q and k begin equal.

    Sites: `query` and `key` [B, T, H, K] before the division, `value` and `read` (o) [B, T, H, V], `gates.log_decay`
    and `gates.beta` [B, T, H], and `state` (S) [B, H, K, V]. A hook on `state` runs at each position, after the write;
    its output is what the query reads and what the next position gets. The mixer then takes one position after the
    other, which is slow.

    Source: Yang, Kautz and Hatamizadeh, Gated Delta Networks (2024), arXiv:2412.06464.

    Args:
        width: D.
        heads: H.
        key_width: K.
        value_width: V.
        conv_width: Positions that the convolutions of q and v read; 0 for no convolution and no SiLU.
        key_conv_width: The same for k.
        gates: The initial gates; see `Gates`.
        allow_negative_eigenvalues: beta up to 2 instead of 1. Above 1, a write reflects what the key reads.
        shifted_value: Write v_t under the key, and with the beta, of position t - 1.
        places: What queries and keys hold beside the token; nothing if None.
        recall: Gets reads of the state, for the mixers behind this one.
        writes: Gets keys and beta of each forward.
    """

    site = "gated_delta"

    def __init__(
        self,
        width: int,
        heads: int,
        key_width: int,
        value_width: int,
        conv_width: int = 4,
        key_conv_width: int = 4,
        gates: InitialGates = "spread",
        allow_negative_eigenvalues: bool = False,
        shifted_value: bool = False,
        places: KeyPlaces | None = None,
        recall: Recall | None = None,
        writes: Writes | None = None,
    ):
        super().__init__()
        self.heads, self.key_width, self.value_width = heads, key_width, value_width
        self.shifted_value, self.recall, self.writes = shifted_value, recall, writes
        self.places = places or KeyPlaces("token", False, None)
        self.q_proj, self.k_proj = (nn.Linear(width, heads * key_width, bias=False) for _ in range(2))
        self.v_proj, self.gate_proj = (nn.Linear(width, heads * value_width, bias=False) for _ in range(2))
        self.k_proj.load_state_dict(self.q_proj.state_dict())  # a token's query finds its key from the start
        self.q_conv, self.v_conv = (ShortConvolution(heads * size, conv_width) for size in (key_width, value_width))
        self.k_conv = ShortConvolution(heads * key_width, key_conv_width)
        if self.places.keys == "position":  # nothing reads them, and DDP waits for the gradients of what is trained
            self.k_proj.requires_grad_(False)
            self.k_conv.requires_grad_(False)
        self.gates = Gates(width, heads, gates, 2.0 if allow_negative_eigenvalues else 1.0)
        self.norm, self.o_proj = nn.RMSNorm(value_width, eps=1e-6), nn.Linear(heads * value_width, width, bias=False)
        self.query, self.key, self.value, self.state, self.read = (nn.Identity() for _ in range(5))

    def init_state(self, batch: int) -> DeltaState:
        """Return the state before the first position: nothing but zeros."""
        zeros = partial(self.gates.A_log.new_zeros, batch)
        q_BPC, k_BPC, v_BPC = (zeros(conv.past, conv.channels) for conv in (self.q_conv, self.k_conv, self.v_conv))
        last_k_B1HK, last_beta_B1H = zeros(1, self.heads, self.key_width), zeros(1, self.heads)
        memory_BHKV = zeros(self.heads, self.key_width, self.value_width)
        seen_B = zeros(dtype=torch.long)
        return DeltaState(0, (q_BPC, k_BPC, v_BPC), last_k_B1HK, last_beta_B1H, memory_BHKV, seen_B)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the contribution to the residual stream, [B, T, D]."""
        return self.extend(x_BTD, self.init_state(len(x_BTD)))[0]

    def step(self, x_BD: Tensor, state: DeltaState) -> tuple[Tensor, DeltaState]:
        """Return the contribution at the next position, [B, D], and the state after it."""
        output_B1D, state = self.extend(x_BD[:, None], state)
        return output_B1D[:, 0], state

    def extend(self, x_BTD: Tensor, state: DeltaState) -> tuple[Tensor, DeltaState]:
        """Return the contribution at the next T positions, [B, T, D], and the state after them."""
        q_BTC, q_BPC = self.q_conv(self.q_proj(x_BTD), state.pasts_BPC[0])
        k_BTC, k_BPC = self.k_conv(self.k_proj(x_BTD), state.pasts_BPC[1])
        v_BTC, v_BPC = self.v_conv(self.v_proj(x_BTD), state.pasts_BPC[2])
        q_BTHK, k_BTHK, v_BTHV = (x.unflatten(2, (self.heads, -1)) for x in (q_BTC, k_BTC, v_BTC))
        q_BTHK, k_BTHK, seen_B = self.places(q_BTHK, k_BTHK, state.position, state.seen_B)
        q_BTHK, k_BTHK, v_BTHV = self.query(q_BTHK), self.key(k_BTHK), self.value(v_BTHV)
        log_decay_BTH, beta_BTH = self.gates(x_BTD)
        if self.writes:
            self.writes.add(k_BTHK, beta_BTH)
        last_k_B1HK, last_beta_B1H = k_BTHK[:, -1:], beta_BTH[:, -1:]
        if self.shifted_value:
            k_BTHK = torch.cat([state.last_k_B1HK.to(k_BTHK.dtype), k_BTHK[:, :-1]], 1)
            beta_BTH = torch.cat([state.last_beta_B1H, beta_BTH[:, :-1]], 1)
        written = k_BTHK, v_BTHV, log_decay_BTH, beta_BTH
        how = self.state, self.gates.most_beta > 1
        o_BTHV, memory_BHKV = run_rule(q_BTHK, written, state.memory_BHKV, *how)
        if self.recall:
            self.recall.offer(written, state.memory_BHKV, memory_BHKV, *how)
        o_BTHV = self.norm(self.read(o_BTHV).to(self.norm.weight.dtype))
        output_BTD = self.o_proj(o_BTHV.flatten(2) * silu(self.gate_proj(x_BTD)))
        position, pasts_BPC = state.position + x_BTD.shape[1], (q_BPC, k_BPC, v_BPC)
        return output_BTD, DeltaState(position, pasts_BPC, last_k_B1HK, last_beta_B1H, memory_BHKV, seen_B)
