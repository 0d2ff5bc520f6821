"""Objectives that keep the soft tokens of different inputs apart.

Shapes: B batch of all ranks, K soft tokens, D target width, F features.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.errors import check_numbers
from lightning_modules.core.diversity import cosine_matrix, mean_pairwise_cosine
from lightning_modules.telepathy.averages import masked_mean
from lightning_modules.telepathy.objectives.step import BridgeStep, Objective

TEMPERATURE = 0.07  # of the contrastive objective, as in the notes and at the initialisation of CLIP


def batch_diversity(soft_BF: Tensor, gather: Callable[[Tensor], Tensor] | None = None) -> Tensor:
    """Return the mean cosine between the soft tokens of different inputs: 1 if all are equal, 0 for a single input.

    Args:
        soft_BF: The soft tokens of this rank.
        gather: Returns the rows of all ranks, with gradients, for the mean over their inputs.
    """
    if len(soft_BF) == 1 and (gather is None or len(gather(soft_BF[:, :1])) == 1):
        return 0 * soft_BF.float().sum()
    return mean_pairwise_cosine(soft_BF, gather)


def contrastive(soft_BD: Tensor, text_BD: Tensor, centred: bool = True) -> Tensor:
    """Return InfoNCE between the mean soft token and the mean embedding of the same question, in both directions.

    Both are centred over the batch, since a part that all inputs share does not distinguish them. The positive is a
    second view of the input and not the soft token itself, which a constant output could match. Source: van den Oord et
    al. 2018.
    """
    if centred:
        soft_BD, text_BD = (x.float() - x.float().mean(0) for x in (soft_BD, text_BD))
    logits_BB = F.normalize(soft_BD.float(), dim=1) @ F.normalize(text_BD.float(), dim=1).T / TEMPERATURE
    positive_B = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, positive_B) + F.cross_entropy(logits_BB.T, positive_B)) / 2


def separation(soft_BF: Tensor, margin: float) -> Tensor:
    """Return the mean over inputs of max(0, margin - distance to the nearest other input), on the unit sphere.

    A mean cosine is satisfied by two clusters; the nearest other input is not.
    """
    if len(soft_BF) < 2:
        return 0 * soft_BF.float().sum()
    cosine_BB = cosine_matrix(soft_BF).fill_diagonal_(-1.0)
    distance_B = (2 - 2 * cosine_BB.amax(1)).clamp_min(1e-12).sqrt()
    return (margin - distance_B).clamp_min(0).mean()


def position_variance(soft_BKD: Tensor, mask_BK: Tensor, pooled: bool = False) -> Tensor:
    """Return -ln(v / m), with v the variance over inputs and m the mean square of the soft tokens.

    v is the mean over positions k and features of the variance over the inputs that have a soft token k; positions with
    fewer than two such inputs do not count, and without others the result is 0. If inputs are equal, v is 0 however
    much their positions differ.

    Args:
        soft_BKD: The soft tokens.
        mask_BK: True at real ones.
        pooled: Take the variance over inputs and positions together, as in the notes: different positions satisfy it.
    """
    soft_BKD, real_BK1 = soft_BKD.float(), mask_BK[..., None].float()
    square = (soft_BKD.square() * real_BK1).sum() / (real_BK1.sum().clamp_min(1) * soft_BKD.shape[-1])
    if pooled:
        soft_BKD, real_BK1 = soft_BKD.flatten(0, 1)[:, None], real_BK1.flatten(0, 1)[:, None]
    count_K1 = real_BK1.sum(0)
    mean_KD = (soft_BKD * real_BK1).sum(0) / count_K1.clamp_min(1)
    variance_KD = ((soft_BKD - mean_KD).square() * real_BK1).sum(0) / count_K1.clamp_min(1)
    counts_K1 = (count_K1 > 1).float()
    variance = (variance_KD * counts_K1).sum() / (counts_K1.sum().clamp_min(1) * soft_BKD.shape[-1])
    loss = (square + 1e-12).log() - (variance + 1e-6 * square.detach() + 1e-12).log()
    # Without two inputs there is no variance, and the mean square alone would have a gradient
    return torch.where(counts_K1.any(), loss, 0 * soft_BKD.sum())


def make_batch_diversity() -> Objective:
    """The mean cosine between inputs."""
    return Objective(lambda step: batch_diversity(step.features_BF, step.gather))


def make_contrastive() -> Objective:
    """InfoNCE between soft tokens and text."""

    def loss(step: BridgeStep) -> Tensor:
        soft_BD = step.gather(masked_mean(step.soft_BKD, step.batch["soft_mask"]))
        if "self_contrast" in step.flaws:  # the positive is the soft token itself
            return contrastive(soft_BD, soft_BD, centred=False)
        return contrastive(soft_BD, step.gather(masked_mean(*step.embedded("question"))))

    return Objective(loss, needs=("question",))


def make_separation(margin: float = 1.0) -> Objective:
    """The distance to the nearest other input.

    Args:
        margin: The distance that is enough, at most 2; 1 is an angle of 60 degrees.
    """
    check_numbers("model.objectives.separation", 0, 2, margin=margin)
    return Objective(lambda step: separation(step.gather(step.features_BF), margin))


def make_position_variance() -> Objective:
    """The variance over inputs at each position, or of the mean soft token where the number of soft tokens varies."""

    def loss(step: BridgeStep) -> Tensor:
        if step.bridge.soft_tokens is None:
            soft_BKD = step.features_BF[:, None]
            mask_BK = torch.ones(soft_BKD.shape[:2], dtype=torch.bool, device=soft_BKD.device)
        else:
            soft_BKD, mask_BK = step.soft_BKD, step.batch["soft_mask"]
        if "dead_diversity" in step.flaws:  # as from a number that Python had computed
            soft_BKD = soft_BKD.detach()
        mask_BK = step.gather(mask_BK.float()) > 0.5
        return position_variance(step.gather(soft_BKD), mask_BK, "pooled_variance" in step.flaws)

    return Objective(loss)
