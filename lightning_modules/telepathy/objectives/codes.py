"""Objectives of bridges whose soft tokens are codes.

Shapes: B batch, K soft tokens, F factors of a code, V values of a factor.
"""

import math

import torch
from torch import Tensor

from lightning_modules.telepathy.averages import row_mean
from lightning_modules.telepathy.objectives.step import BridgeStep, Objective

TINY = 1e-12  # a share whose entropy is nothing


def code_entropy(share_FV: Tensor, size: int) -> Tensor:
    """Return 1 - (entropy of the mean shares, summed over factors) / ln(number of codes): 0 if all are used equally."""
    # At 0 the entropy's slope is infinite: values that a factor does not have would get NaN for a gradient
    entropy: Tensor = torch.special.entr(share_FV.clamp_min(TINY)).sum()
    return 1 - entropy / math.log(size)


def make_commitment() -> Objective:
    """The squared distance between soft tokens and their codes, which moves both sides."""

    def loss(step: BridgeStep) -> Tensor:
        codes = step.encoding.codes
        assert codes is not None  # the module has checked it
        return row_mean(codes.commitment_BK, step.batch["soft_mask"])

    return Objective(loss)


def make_code_entropy() -> Objective:
    """How unevenly codes are used, over the soft tokens of all ranks."""

    def loss(step: BridgeStep) -> Tensor:
        mask_BK = step.batch["soft_mask"]
        share_BKFV = step.bottleneck.shares(step.encoding.bridged_BKD)
        sum_FV = step.gather((share_BKFV * mask_BK[..., None, None]).sum((0, 1))[None]).sum(0)
        return code_entropy(sum_FV / sum_FV[0].sum(), step.bottleneck.size)

    return Objective(loss)
