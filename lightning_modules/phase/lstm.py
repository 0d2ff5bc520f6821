"""The mixer `lstm`, to compare the phase mixer with.

Shapes: B batch, T positions, D width.
"""

from typing import cast

import torch
from torch import Tensor, nn

from lightning_modules.core.ensemble import member_call

State = tuple[Tensor, Tensor]  # h_1BD, c_1BD


class LSTM(nn.Module):
    """A long short-term memory whose hidden state, D wide, is the contribution to the residual stream.

    Source: Hochreiter and Schmidhuber (1997), with the forget gate of Gers, Schmidhuber and Cummins (2000).

    Args:
        width: D.
    """

    site = "lstm"

    def __init__(self, width: int):
        super().__init__()
        self.cell = nn.LSTM(width, width, batch_first=True)

    def init_state(self, batch: int) -> State:
        """Return zeros."""
        zeros_1BD = cast(Tensor, self.cell.weight_hh_l0).new_zeros(1, batch, self.cell.hidden_size)
        return zeros_1BD, zeros_1BD

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the contribution to the residual stream, [B, T, D]."""
        if member_call():  # torch cannot vmap its own loop over positions
            return self._by_position(x_BTD)
        return cast(Tensor, self.cell(x_BTD)[0])

    def step(self, x_BD: Tensor, state: State) -> tuple[Tensor, State]:
        """Return the contribution at the next position, [B, D], and the state after it."""
        output_B1D, state = self.cell(x_BD[:, None], state)
        return output_B1D[:, 0], state

    def _by_position(self, x_BTD: Tensor) -> Tensor:
        input_weight, weight, *biases = (cast(Tensor, parameter) for parameter in self.cell.parameters())
        h_BD, c_BD = (x_1BD[0] for x_1BD in self.init_state(len(x_BTD)))
        outputs = []
        for gates_BG in (x_BTD @ input_weight.mT + sum(biases)).unbind(1):
            in_BD, forget_BD, new_BD, out_BD = (gates_BG + h_BD @ weight.mT).chunk(4, 1)
            c_BD = forget_BD.sigmoid() * c_BD + in_BD.sigmoid() * new_BD.tanh()
            h_BD = out_BD.sigmoid() * c_BD.tanh()
            outputs.append(h_BD)
        return torch.stack(outputs, 1)
