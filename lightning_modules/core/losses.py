"""Losses that each member of an ensemble has for itself.

Shapes: S ensemble members, B batch, T positions, V vocabulary.
"""

from torch import Tensor
from torch.nn.functional import cross_entropy

from datamodules.batch import IGNORE


def member_losses(logits_SBTV: Tensor, labels: Tensor, double: bool = False) -> Tensor:
    """Return the mean cross-entropy over the labelled positions of each member, in nats, [S]; 0 without labels.

    Args:
        logits_SBTV: Logits.
        labels: [S, B, T], or [B, T] where all members share them; aligned with the logits.
        double: Compute in fp64 instead of fp32. fp32 rounds losses below about 1e-7 to zero (softmax collapse).
    """
    labels_SN = labels.expand(logits_SBTV.shape[:3]).flatten(1)
    logits_NV = logits_SBTV.flatten(0, 2)
    losses_N = cross_entropy(
        logits_NV.double() if double else logits_NV.float(), labels_SN.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses_N.view(labels_SN.shape).sum(1) / (labels_SN != IGNORE).sum(1).clamp(min=1)
