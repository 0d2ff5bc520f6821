"""Random orthogonal matrices.

Shapes: R rows, C columns.
"""

import torch
from torch import Tensor

from lightning_modules.pretrained.loading_device import loading_device


@torch.no_grad()
def orthogonal_(weight_RC: Tensor) -> Tensor:
    """Fill a matrix with orthogonal rows, or columns if these are fewer, and return it (Saxe et al. 2014).

    It is `nn.init.orthogonal_`, bit for bit on a CPU. The numbers are drawn on the device of the matrix, so that a seed
    gives the same start everywhere. The QR decomposition, which is nearly all of the work, runs on the device that
    models are loaded to: for a bridge of a billion parameters it takes a minute on a core of a CPU.
    """
    drawn_RC = torch.empty_like(weight_RC).normal_().to(loading_device())
    is_wide = len(weight_RC) < weight_RC.shape[1]
    basis, triangle = torch.linalg.qr(drawn_RC.T if is_wide else drawn_RC)
    basis *= triangle.diagonal().sign()  # without it, not all orthogonal matrices are equally likely
    return weight_RC.copy_(basis.T if is_wide else basis)
