"""A recurrent network with gates (Cho et al. 2014), one step at a time.

Shapes: B batch, T positions, V vocabulary, D width.
"""

import torch
from torch import Tensor, nn


class GRU(nn.Module):
    """h_t = (1 - z) n + z h_{t-1}, n = tanh(W_n x + r U_n h_{t-1}), with gates z and r = sigmoid(W x + U h_{t-1}).

    Sites: `embedding`, `state` (h_t) and `final_residual` (the states of all positions).

    Args:
        vocab_size: V.
        width: D.
    """

    def __init__(self, vocab_size: int, width: int):
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        self.read, self.recur = nn.Linear(width, 3 * width), nn.Linear(width, 3 * width)
        self.state, self.final_residual = nn.Identity(), nn.Identity()
        self.unembed = nn.Linear(width, vocab_size)

    def init_state(self, batch: int) -> Tensor:
        """Return h_0 = 0."""
        return self.recur.weight.new_zeros(batch, self.recur.in_features)

    def advance(self, x_BD: Tensor, h_BD: Tensor) -> Tensor:
        """Return the next state."""
        z_x, r_x, n_x = self.read(x_BD).chunk(3, dim=-1)
        z_h, r_h, n_h = self.recur(h_BD).chunk(3, dim=-1)
        z_BD = (z_x + z_h).sigmoid()
        n_BD = (n_x + (r_x + r_h).sigmoid() * n_h).tanh()
        return self.state((1 - z_BD) * n_BD + z_BD * h_BD)

    def step(self, token_B: Tensor, h_BD: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits_BV at the next position, and the state after it."""
        h_BD = self.advance(self.embedding(token_B), h_BD)
        return self.unembed(self.final_residual(h_BD)), h_BD

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """Return logits_BTV."""
        h_BD, states = self.init_state(len(tokens_BT)), []
        for x_BD in self.embedding(tokens_BT).unbind(1):
            h_BD = self.advance(x_BD, h_BD)
            states.append(h_BD)
        return self.unembed(self.final_residual(torch.stack(states, dim=1)))
