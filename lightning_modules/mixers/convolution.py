"""The short causal convolution of the gated delta mixer.

Shapes: B batch, T positions, C channels, W width of the kernel, P = W - 1 positions of the past.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, silu


class ShortConvolution(nn.Module):
    """silu(sum_i w_i x_{t-i}) over i < W, for each channel alone; the identity if W is 0.

    Args:
        channels: C.
        width: W.
    """

    def __init__(self, channels: int, width: int):
        super().__init__()
        self.channels, self.past = channels, max(width - 1, 0)
        # The range of torch's own convolutions with one input channel per output channel
        weight_C1W = torch.empty(channels, 1, width).uniform_(-1, 1) * max(width, 1) ** -0.5
        self.weight = nn.Parameter(weight_C1W) if width else None

    def init_past(self, batch: int, like: Tensor) -> Tensor:
        """Return the inputs before the first position: zeros, [B, P, C]."""
        return like.new_zeros(batch, self.past, self.channels)

    def forward(self, x_BTC: Tensor, past_BPC: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, [B, T, C], and the last P inputs."""
        if self.weight is None:
            return x_BTC, past_BPC
        x_BTC = torch.cat([past_BPC.to(x_BTC.dtype), x_BTC], 1)
        y_BCT = conv1d(x_BTC.mT, self.weight.to(x_BTC.dtype), groups=self.channels)
        return silu(y_BCT.mT), x_BTC[:, x_BTC.shape[1] - self.past :]
