"""The objectives of a bridge. Each is a function of tensors, and an entry of `OBJECTIVES` that reads a training step.

Shapes: B batch (of all ranks), K soft tokens, Q question tokens, D target width, F features, N answer tokens of the
whole batch, V vocabulary.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from datamodules.errors import UserError, check_numbers
from lightning_modules.core.diversity import mean_pairwise_cosine
from lightning_modules.telepathy.batch import TrainingBatch
from lightning_modules.telepathy.target import Target

ObjectiveName = Literal["lm", "batch_diversity", "contrastive", "kl_text"]

TEMPERATURE = 0.07  # of the contrastive objective, as in the notes and at the initialisation of CLIP


def lm(logits_NV: Tensor, labels_N: Tensor) -> Tensor:
    """Return the mean cross-entropy of the answer tokens, in nats."""
    return F.cross_entropy(logits_NV.float(), labels_N)


def batch_diversity(soft_BF: Tensor) -> Tensor:
    """Return the mean cosine between the soft tokens of different inputs: 1 if all are equal, 0 for a single input."""
    return mean_pairwise_cosine(soft_BF) if len(soft_BF) > 1 else 0 * soft_BF.float().sum()


def contrastive(soft_BD: Tensor, text_BD: Tensor) -> Tensor:
    """Return InfoNCE between the mean soft token and the mean embedding of the same question, in both directions.

    Both are centred over the batch, since a part that all inputs share does not distinguish them. The positive is a
    second view of the input and not the soft token itself, which a constant output could match. Source: van den Oord et
    al. 2018.
    """
    soft_BD, text_BD = (F.normalize(x.float() - x.float().mean(0), dim=1) for x in (soft_BD, text_BD))
    logits_BB = soft_BD @ text_BD.T / TEMPERATURE
    positive_B = torch.arange(len(logits_BB), device=logits_BB.device)
    return (F.cross_entropy(logits_BB, positive_B) + F.cross_entropy(logits_BB.T, positive_B)) / 2


def kl_text(logits_NV: Tensor, teacher_NV: Tensor) -> Tensor:
    """Return the mean KL(teacher || bridge) over the answer tokens; the teacher is the target that reads the text."""
    student_NV, teacher_NV = logits_NV.float().log_softmax(-1), teacher_NV.float().log_softmax(-1)
    return F.kl_div(student_NV, teacher_NV, log_target=True, reduction="batchmean")


@dataclass
class BridgeStep:
    """One training step, as objectives read it.

    Attributes:
        batch: The batch of this rank.
        target: The frozen target.
        soft_BKD: The soft tokens.
        logits_NV: The target's logits at the answer tokens, from the soft tokens.
        fixed_count: Whether every input has the same number of soft tokens.
        gather: Returns the rows of all ranks, with gradients.
    """

    batch: TrainingBatch
    target: Target
    soft_BKD: Tensor
    logits_NV: Tensor
    fixed_count: bool
    gather: Callable[[Tensor], Tensor]

    @property
    def features_BF(self) -> Tensor:
        """All soft tokens of an input in one row, or their mean if the number varies, so that ranks agree on F."""
        return self.soft_BKD.flatten(1) if self.fixed_count else masked_mean(self.soft_BKD, self.batch["soft_mask"])


@dataclass(frozen=True)
class Objective:
    """How one objective reads a training step.

    Attributes:
        loss: The unweighted loss.
        by_token: The loss is a mean over this rank's answer tokens. It is weighted with their number, so that the mean
            over ranks is a mean over all tokens.
        needs: What the batch must hold beside the rows with soft tokens: `question` or `text`.
    """

    loss: Callable[[BridgeStep], Tensor]
    by_token: bool = False
    needs: tuple[Literal["question", "text"], ...] = ()


def _lm(step: BridgeStep) -> Tensor:
    return lm(step.logits_NV, step.batch["soft"].labels_N)


def _batch_diversity(step: BridgeStep) -> Tensor:
    return batch_diversity(step.gather(step.features_BF))


def _contrastive(step: BridgeStep) -> Tensor:
    batch = step.batch
    soft_BD = masked_mean(step.soft_BKD, batch["soft_mask"])
    text_BD = masked_mean(step.target.embedding(batch["question"]), batch["question_mask"])
    return contrastive(step.gather(soft_BD), step.gather(text_BD))


def _kl_text(step: BridgeStep) -> Tensor:
    with torch.no_grad():
        teacher_NV = step.target.logits(step.batch["text"])
    return kl_text(step.logits_NV, teacher_NV)


OBJECTIVES: dict[ObjectiveName, Objective] = {
    "lm": Objective(_lm, by_token=True),
    "batch_diversity": Objective(_batch_diversity),
    "contrastive": Objective(_contrastive, needs=("question",)),
    "kl_text": Objective(_kl_text, by_token=True, needs=("text",)),
}


def check_weights(weights: Mapping[ObjectiveName, float]) -> None:
    """Check the weights of objectives.

    Raises:
        UserError: There is no such objective, a weight is negative or not finite, or none has a weight.
    """
    for name in weights:
        if name not in OBJECTIVES:
            raise UserError(f"model.objectives has no '{name}': choose among {', '.join(OBJECTIVES)}")
    check_numbers("model.objectives", 0, **{str(name): weight for name, weight in weights.items()})
    if not any(weights.values()):
        raise UserError("model.objectives is empty: give at least one objective a weight, such as {lm: 1.0}")


def masked_mean(x_BKD: Tensor, mask_BK: Tensor) -> Tensor:
    """Return the mean over real positions; zero for a row without any."""
    weight_BK1 = mask_BK[..., None].to(x_BKD.dtype)
    return (x_BKD * weight_BK1).sum(1) / weight_BK1.sum(1).clamp_min(1)
