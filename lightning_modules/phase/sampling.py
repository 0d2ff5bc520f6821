"""Scheduled sampling: a model that reads some of its own predictions in training, as it does when it generates.

Shapes: S ensemble members, B batch, T positions, V vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from datamodules.batch import IGNORE
from lightning_modules.core.seeding import seeded_generator

STREAM = 0x5A3D  # first number of the seeds, which keeps the random numbers apart from those of other owners


def mixed_tokens(
    tokens: Tensor, labels: Tensor, logits_SBTV: Tensor, share: float, seeds: Sequence[int], *step: int
) -> Tensor:
    """Return the tokens with a share of them replaced by samples of the model, [S, B, T], or [B, T] for one member.

    Token t + 1 may become a sample of the logits at t, where there is a label at t; the first token stays. Every
    member has random numbers of its own, which are the same at the same step of another run with its seed.

    Source: Bengio et al. (2015), arXiv:1506.03099; in parallel over positions as by Mihaylova and Martins (2019),
    arXiv:1906.07651.

    Args:
        tokens: [S, B, T], or [B, T] where all members share them.
        labels: Likewise.
        logits_SBTV: Logits that the model gives for the tokens.
        share: The share.
        seeds: The seed of each member.
        *step: Integers that identify the step and the rank.
    """
    tokens_SBT, labels_SBT = (x.expand(logits_SBTV.shape[:3]) for x in (tokens, labels))
    uniform_S2BT = torch.stack(
        [
            torch.rand(
                2,
                *tokens_SBT.shape[1:],
                generator=seeded_generator(STREAM, seed, *step, device=tokens.device),
                device=tokens.device,
            )
            for seed in seeds
        ]
    )
    pick_SBT, level_SBT = uniform_S2BT.unbind(1)
    # The first token at which the cumulative probability passes a uniform number
    cumulative_SBTV = logits_SBTV.float().softmax(3).cumsum(3)
    sample_SBT = (cumulative_SBTV < level_SBT[..., None]).sum(3).clamp(max=logits_SBTV.shape[3] - 1)
    replaced_SBT = (pick_SBT < share) & (labels_SBT != IGNORE)
    later_SBT = torch.where(replaced_SBT, sample_SBT, IGNORE)[..., :-1]
    mixed_SBT = tokens_SBT.clone()
    mixed_SBT[..., 1:] = torch.where(later_SBT == IGNORE, tokens_SBT[..., 1:], later_SBT)
    return mixed_SBT if len(seeds) > 1 else mixed_SBT[0]
