"""The mixer `lstm`, to compare the phase mixer with.

Shapes: B batch, T positions, D width.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_modules.core.ensemble import member_call

State = tuple[Tensor, Tensor]  # h_1BD, c_1BD


class _MemberLSTM(torch.autograd.Function):
    """`torch.lstm` for an ensemble, one member after another; `vmap` alone runs, and records gradients as usual."""

    @staticmethod
    def forward(x_BTD: Tensor, *weights: Tensor) -> Tensor:
        """Return h_BTD, from a state of zeros."""
        zeros_1BD = x_BTD.new_zeros(1, len(x_BTD), weights[1].shape[1])
        return torch.lstm(x_BTD, (zeros_1BD, zeros_1BD), weights, True, 1, 0.0, True, False, True)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Keep nothing; vmap wants this method."""

    @staticmethod
    def vmap(info: Any, in_dims: Sequence[int | None], *inputs: Tensor) -> tuple[Tensor, int]:
        """Return h_SBTD."""
        per_member = zip(
            *([x] * info.batch_size if dim is None else x.unbind(dim) for x, dim in zip(inputs, in_dims, strict=True)),
            strict=True,
        )
        return torch.stack([_MemberLSTM.forward(*of_member) for of_member in per_member]), 0


class _Cell(nn.LSTM):
    """PyTorch's LSTM, whose weights may have a first axis of members."""

    def flatten_parameters(self) -> None:
        """Make one block of memory of the weights for cuDNN, which knows no members, as PyTorch does on each move."""
        if cast(Tensor, self.weight_hh_l0).dim() == 2:
            super().flatten_parameters()


class LSTM(nn.Module):
    """A long short-term memory whose hidden state, D wide, is the contribution to the residual stream.

    Source: Hochreiter and Schmidhuber (1997), with the forget gate of Gers, Schmidhuber and Cummins (2000).

    Args:
        width: D.
    """

    site = "lstm"

    def __init__(self, width: int):
        super().__init__()
        self.cell = _Cell(width, width, batch_first=True)

    def init_state(self, batch: int) -> State:
        """Return zeros."""
        zeros_1BD = cast(Tensor, self.cell.weight_hh_l0).new_zeros(1, batch, self.cell.hidden_size)
        return zeros_1BD, zeros_1BD

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the contribution to the residual stream, [B, T, D]."""
        if not member_call():
            return cast(Tensor, self.cell(x_BTD)[0])
        if torch.compiler.is_compiling():  # which loses the gradient of an `autograd.Function` under vmap
            return self._by_position(x_BTD)
        return cast(Tensor, _MemberLSTM.apply(x_BTD, *self.cell.parameters()))  # type: ignore[no-untyped-call]

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
