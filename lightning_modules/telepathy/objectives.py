"""What a bridge is trained for. Each objective is one function; the module adds them up with their weights.

Shapes: B batch (all ranks), F features, N answer tokens, V vocabulary.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_modules.core.diversity import mean_pairwise_cosine

Objective = Literal["lm", "batch_diversity", "contrastive", "kl_text"]

TEMPERATURE = 0.07  # of the contrastive objective, as in the notes and in CLIP's initialisation


def lm(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Mean cross-entropy of the answer's tokens, in nats."""
    return F.cross_entropy(logits_NV.float(), labels_N)


def batch_diversity(soft_BF: Tensor) -> Tensor:
    """Mean cosine between the soft tokens of different inputs: 1 where all are the same; 0 for a single input."""
    return mean_pairwise_cosine(soft_BF) if len(soft_BF) > 1 else 0 * soft_BF.float().sum()


def contrastive(soft_BD: Tensor, text_BD: Tensor) -> Tensor:
    """InfoNCE between mean soft token and mean embedding of the same question (van den Oord et al. 2018), both ways.

    Both are centred over the batch: what all inputs share tells no two apart. The positives are another view of the
    input, never the feature itself, which a constant could satisfy.
    """
    soft_BD, text_BD = (F.normalize(x.float() - x.float().mean(0), dim=1) for x in (soft_BD, text_BD))
    logits_BB = soft_BD @ text_BD.T / TEMPERATURE
    own_B = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, own_B) + F.cross_entropy(logits_BB.T, own_B)) / 2


def kl_text(logits_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Mean KL(teacher || bridge) over the answer's tokens; the teacher is the target that reads the text."""
    student_NV, teacher_NV = logits_NV.float().log_softmax(-1), teacher_NV.float().log_softmax(-1)
    return F.kl_div(student_NV, teacher_NV, log_target=True, reduction="batchmean")
