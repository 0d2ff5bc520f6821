"""An MLP with a gate."""

from typing import cast

from torch import Tensor, nn
from torch.nn.functional import silu


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)), with widths D -> M -> D (Shazeer 2020, arXiv:2002.05202).

    Args:
        width: D.
        hidden: M.
    """

    def __init__(self, width: int, hidden: int):
        super().__init__()
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """Return the MLP's contribution to the residual stream."""
        return cast(Tensor, self.down(silu(self.gate(x_BTD)) * self.up(x_BTD)))
