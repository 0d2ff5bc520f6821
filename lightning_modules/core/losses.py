"""Losses that each member of an ensemble has for itself.

Shapes: S ensemble members, B batch, T positions, N positions of a batch, D width, V vocabulary.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.utils.checkpoint import checkpoint

from datamodules.batch import IGNORE
from lightning_modules.core.metrics import predicted_tokens

CHUNK = 2**24  # logits of all members that are in memory at once: 64 MiB in fp32


def member_losses(logits_SBTV: Tensor, labels: Tensor, double: bool = False) -> Tensor:
    """Return the mean cross-entropy over the labelled positions of each member, in nats, [S]; 0 without labels.

    Args:
        logits_SBTV: Logits.
        labels: [S, B, T], or [B, T] where all members share them; aligned with the logits.
        double: Compute in fp64 instead of fp32. fp32 rounds losses below about 1e-7 to zero (softmax collapse).
    """
    labels_SN = labels.expand(logits_SBTV.shape[:3]).flatten(1)
    return _mean(_position_losses(logits_SBTV.flatten(1, 2), labels_SN, double), labels_SN)


def linear_member_losses(
    x_SBTD: Tensor, weight_SVD: Tensor, labels: Tensor, most_labelled: int | None = None, double: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the losses of `member_losses` for the logits W x, and the predicted tokens_SBT, without all logits.

    Logits are made for labelled positions alone, `CHUNK` at a time, and again in the backward. torch's
    `linear_cross_entropy` is no substitute: torch 2.11 lacks it, it returns no predictions, and its chunks cannot be
    compiled.

    Args:
        x_SBTD: What the unembedding reads.
        weight_SVD: W, the weights of the unembedding.
        labels: [S, B, T], or [B, T] where all members share them.
        most_labelled: At least the number of labelled positions of each member, known without the device; None for
            logits at every position.
        double: Compute the cross-entropy in fp64 instead of fp32.

    Returns:
        The losses [S], and the tokens [S, B, T] with the largest logit: -1 where a logit is NaN, and `IGNORE` where
        there is no label.
    """
    x_SND, labels_SN = x_SBTD.flatten(1, 2), labels.expand(x_SBTD.shape[:3]).flatten(1)
    # The labelled positions come first; a fixed number of them, since the program would wait for a count on a GPU
    order_SN = (labels_SN == IGNORE).byte().argsort(dim=1, stable=True)[:, :most_labelled]
    x_SND, label_SN = (
        x_SND.gather(1, order_SN[..., None].expand(-1, -1, x_SND.shape[2])),
        labels_SN.gather(1, order_SN),
    )
    size = max(1, CHUNK // weight_SVD[..., 0].numel())
    run = partial(_chunk_losses, double=double)
    if label_SN.shape[1] > size:
        run = partial(checkpoint, run, use_reentrant=False, preserve_rng_state=False)
    chunks = zip(torch.split(x_SND, size, 1), torch.split(label_SN, size, 1), strict=True)
    losses, predicted = zip(*(run(x_SND, weight_SVD, label_SN) for x_SND, label_SN in chunks), strict=True)
    predicted_SN = torch.full_like(labels_SN, IGNORE).scatter(
        1, order_SN, torch.cat(predicted, 1).where(label_SN != IGNORE, IGNORE)
    )
    return _mean(torch.cat(losses, 1), label_SN), predicted_SN.view(x_SBTD.shape[:3])


def _chunk_losses(x_SND: Tensor, weight_SVD: Tensor, label_SN: Tensor, double: bool) -> tuple[Tensor, Tensor]:
    logits_SNV = x_SND @ weight_SVD.mT
    return _position_losses(logits_SNV, label_SN, double), predicted_tokens(logits_SNV.detach())


def _position_losses(logits_SNV: Tensor, labels_SN: Tensor, double: bool) -> Tensor:
    logits_MV = logits_SNV.flatten(0, 1)
    losses_M = cross_entropy(
        logits_MV.double() if double else logits_MV.float(), labels_SN.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses_M.view(labels_SN.shape)


def _mean(losses_SN: Tensor, labels_SN: Tensor) -> Tensor:
    return losses_SN.sum(1) / (labels_SN != IGNORE).sum(1).clamp(min=1)
