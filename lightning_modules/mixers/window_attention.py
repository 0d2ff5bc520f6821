"""The mixer `window_attention`: causal attention to the last W positions.

Shapes: B batch, T positions, D width, H heads, K head width, W window, C cached positions, S = C + T, V value width of
the recurrent state.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_modules.mixers.local_attention import choose, seen
from lightning_modules.mixers.recall import Recall
from lightning_modules.mixers.rotary import rotate


@dataclass
class WindowCache:
    """Keys and values of the last C <= W positions, [B, C, H, K], and the number of positions seen."""

    position: int
    k_BCHK: Tensor
    v_BCHK: Tensor


class WindowAttention(nn.Module):
    """o_t = sum_s softmax_s(<R_t q_t, R_s k_s> / sqrt(K)) v_s over t - W < s <= t, with rotary positions R.

    With `recall`, each position also reads the state S_t of the gated delta mixer before it, with a query of its own:
    o_t + state_o(RMSNorm(S_t^T state_q(x_t))). S_t depends on no later position, unless `recall`
    reads the final state.

    The site `pattern` gives the attention weights, [B, H, T, S]; they are held in memory only if it has a hook.

    Args:
        width: D.
        heads: H; K = D / H is even.
        window: W.
        recall: The reads of the state, which has H heads too.
    """

    site = "window_attention"

    def __init__(self, width: int, heads: int, window: int, recall: Recall | None = None):
        super().__init__()
        self.heads, self.window, self.recall = heads, window, recall
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.pattern = nn.Identity()
        if recall:
            recall.readers += 1
            self.state_q = nn.Linear(width, heads * recall.key_width, bias=False)
            self.state_norm = nn.RMSNorm(recall.value_width, eps=1e-6)
            self.state_o = nn.Linear(heads * recall.value_width, width, bias=False)

    def init_state(self, batch: int) -> WindowCache:
        """Return an empty cache."""
        empty_BCHK = self.q_proj.weight.new_empty(batch, 0, self.heads, self.q_proj.out_features // self.heads)
        return WindowCache(0, empty_BCHK, empty_BCHK)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the contribution to the residual stream, [B, T, D]."""
        return self.extend(x_BTD, self.init_state(len(x_BTD)))[0]

    def step(self, x_BD: Tensor, state: WindowCache) -> tuple[Tensor, WindowCache]:
        """Return the contribution at the next position, [B, D], and the cache with that position."""
        output_B1D, state = self.extend(x_BD[:, None], state)
        return output_B1D[:, 0], state

    def extend(self, x_BTD: Tensor, state: WindowCache) -> tuple[Tensor, WindowCache]:
        """Return the contribution at the next T positions, [B, T, D], and the cache with those positions."""
        projections = self.q_proj, self.k_proj, self.v_proj
        q_BTHK, k_BTHK, v_BTHK = (y(x_BTD).unflatten(2, (self.heads, -1)) for y in projections)
        end = state.position + x_BTD.shape[1]
        positions_T = torch.arange(state.position, end, device=x_BTD.device)
        q_BTHK, k_BSHK, v_BSHK = rotate(q_BTHK, positions_T), rotate(k_BTHK, positions_T), v_BTHK
        if state.k_BCHK.shape[1]:  # else FlashAttention reads the values where their projection put them
            k_BSHK = torch.cat([state.k_BCHK.to(k_BSHK.dtype), k_BSHK], 1)
            v_BSHK = torch.cat([state.v_BCHK.to(v_BSHK.dtype), v_BSHK], 1)
        output_BTD = self.o_proj(self._attend(q_BTHK, k_BSHK, v_BSHK).flatten(2))
        if self.recall:
            read_BTHV = self.recall(self.state_q(x_BTD).unflatten(2, (self.heads, -1)))
            output_BTD = output_BTD + self.state_o(
                self.state_norm(read_BTHV.to(self.state_norm.weight.dtype)).flatten(2)
            )
        return output_BTD, WindowCache(end, k_BSHK[:, -self.window :], v_BSHK[:, -self.window :])

    def _attend(self, q_BTHK: Tensor, k_BSHK: Tensor, v_BSHK: Tensor) -> Tensor:
        if not self.pattern._forward_hooks:
            return choose(q_BTHK, k_BSHK.shape[1], self.window)(q_BTHK, k_BSHK, v_BSHK, self.window)
        seen_TS = seen(q_BTHK.shape[1], k_BSHK.shape[1], self.window, q_BTHK.device)
        score_BHTS = torch.einsum("bthk,bshk->bhts", q_BTHK, k_BSHK) * q_BTHK.shape[-1] ** -0.5
        pattern_BHTS = self.pattern(score_BHTS.masked_fill(~seen_TS, -torch.inf).softmax(-1))
        return torch.einsum("bhts,bshk->bthk", pattern_BHTS.to(v_BSHK.dtype), v_BSHK)
