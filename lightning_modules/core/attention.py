"""Which of PyTorch's kernels for attention a process uses."""

import torch


def leave_out_cudnn_attention() -> None:
    """Let PyTorch attend without cuDNN in this process, by flash or memory-efficient attention instead.

    PyTorch prefers cuDNN on H100 and H200 from 2.11 on. But cuDNN plans each new shape of a batch on the CPU for tenths
    of a second, forward and backward, and nearly every batch of text has a new one. Some versions also give NaN for
    gradients under a mask. Attention is a small part of a step with rows as short as those here.
    """
    torch.backends.cuda.enable_cudnn_sdp(False)
