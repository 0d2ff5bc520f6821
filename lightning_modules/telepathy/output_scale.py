"""The scale of soft tokens.

Shapes: B batch, K soft tokens, D target width.
"""

from typing import Literal

import torch
from torch import Tensor, nn

OutputName = Literal["rms", "tanh", "none"]


def rms_unit(x_BKD: Tensor) -> Tensor:
    """Return vectors in fp32 at root mean square 1."""
    return nn.functional.rms_norm(x_BKD.float(), list(x_BKD.shape[-1:]), eps=1e-8)


class OutputScale(nn.Module):
    """Bring soft tokens to the scale of the target's embeddings, with a learned factor s.

    `rms`: x / rms(x) · s; `tanh`: tanh(x) · s; `none`: x · s.

    Args:
        mode: The formula.
        scale: The initial s, such as the root mean square of the embeddings.
    """

    def __init__(self, mode: OutputName, scale: float):
        super().__init__()
        self.mode = mode
        self.scale = nn.Parameter(torch.tensor(scale))

    def forward(self, soft_BKD: Tensor, mask_BK: Tensor) -> Tensor:
        """Return the scaled soft_BKD in fp32, zero where the mask is False."""
        soft_BKD = soft_BKD.float()
        match self.mode:
            case "rms":
                soft_BKD = rms_unit(soft_BKD)
            case "tanh":
                soft_BKD = soft_BKD.tanh()
        return soft_BKD * self.scale * mask_BK[..., None]
