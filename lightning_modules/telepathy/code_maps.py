"""Learned maps around the codes of a bottleneck: of the codebook itself, and from codes to vectors for the target.

Shapes: B batch, K soft tokens, D target width, V codes of the codebook.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_modules.telepathy.orthogonal import orthogonal_

PACE = 0.05  # of the codebook, in learning rates of the bridge
READER = 768  # width of the hidden layer behind the codes, as that of V15's bridge


class SlowMap(nn.Module):
    """A linear map that moves slowly from an orthogonal one: with Adam, at a twentieth of the learning rate.

    A codebook that moves as fast as a bridge leaves its inputs behind: within ten steps another code is the nearest.

    Args:
        width: D.
    """

    base_DD: Tensor

    def __init__(self, width: int):
        super().__init__()
        self.register_buffer("base_DD", orthogonal_(torch.empty(width, width)))
        self.change_DD = nn.Parameter(torch.zeros(width, width))

    def forward(self, codes_VD: Tensor) -> Tensor:
        """Return the mapped codes."""
        return F.linear(codes_VD, self.base_DD + PACE * self.change_DD)


def reader(inputs: int, width: int) -> nn.Sequential:
    """Return a learned map with a hidden layer from codes to vectors for the target.

    A linear map of five numbers gives vectors in five of the target's dimensions, in which its words hardly differ.
    """
    return nn.Sequential(nn.Linear(inputs, READER), nn.GELU(), nn.Linear(READER, width))


class Residual(nn.Module):
    """Vectors and what a hidden layer adds to them, which is nothing at the start.

    Args:
        width: D.
    """

    def __init__(self, width: int):
        super().__init__()
        self.added = reader(width, width)
        for parameter in self.added[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, vectors_BKD: Tensor) -> Tensor:
        """Return the vectors with what is added."""
        read_BKD: Tensor = vectors_BKD + self.added(vectors_BKD)
        return read_BKD
