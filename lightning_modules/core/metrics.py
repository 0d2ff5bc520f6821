"""Proportions with their uncertainty, and the measures that every sequence model has.

Shapes: S ensemble members, B batch, T positions, N labelled positions, V vocabulary.
"""

import math
from typing import NamedTuple, cast

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor
from torchmetrics import Metric

from datamodules.batch import IGNORE
from lightning_modules.core.intervals import wilson_interval

NO_TOKEN = -1  # in the place of a predicted token


class Proportion(Metric):
    """The share of hits among all samples, over all ranks, with its Wilson interval."""

    full_state_update = False
    hits: Tensor
    total: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("hits", torch.zeros(()), dist_reduce_fx="sum")
        self.add_state("total", torch.zeros(()), dist_reduce_fx="sum")

    def update(self, hits: Tensor | float, count: Tensor | int = 1) -> None:
        """Add `count` samples, `hits` of which are hits."""
        self.hits += hits
        self.total += count

    def compute(self) -> Tensor:
        """Return (share, low, high, count)."""
        hits, total = self.hits.item(), self.total.item()
        share = hits / total if total else math.nan
        return torch.tensor([share, *wilson_interval(hits, total), total], device=self.hits.device)


class TokenScores(NamedTuple):
    """The logits at the labelled positions, reduced to what measures need.

    Attributes:
        label_N: The labels.
        own_SN: Logit of the label.
        best_SN: Largest logit of the other tokens.
        other_SN: The token with that logit.
    """

    label_N: Tensor
    own_SN: Tensor
    best_SN: Tensor
    other_SN: Tensor

    @property
    def hits_SN(self) -> Tensor:
        """1 where the label has the strictly largest logit, else 0; NaN where a logit is NaN."""
        return strictly_above(self.own_SN, self.best_SN)


def strictly_above(own: Tensor, best: Tensor) -> Tensor:
    """Return 1 where `own` is larger than the best of the others, else 0, in fp64; NaN where one of the two is NaN."""
    return (own > best).double().masked_fill(own.isnan() | best.isnan(), torch.nan)


class TokenMeasures(Metric):
    """Accuracy and loss of next-token prediction over the labelled positions, for each ensemble member.

    - `accuracy`: share of positions whose label has the strictly largest logit.
    - `loss`: mean cross-entropy in nats.

    Sums are in fp64 and over all ranks.

    Args:
        members: S.
    """

    full_state_update = False
    higher_is_better = None
    accuracy: Tensor
    loss: Tensor
    count: Tensor

    def __init__(self, members: int):
        super().__init__()
        for name, shape in {"accuracy": (members,), "loss": (members,), "count": ()}.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logits_SBTV: Tensor, labels_BT: Tensor) -> None:
        """Add a batch whose labels all members share."""
        self.add_scores(logits_SBTV, labels_BT)

    def add_scores(self, logits_SBTV: Tensor, labels_BT: Tensor) -> TokenScores:
        """Add a batch to accuracy and loss, and return the scores from which they are computed."""
        labelled_BT = labels_BT != IGNORE
        label_N = labels_BT[labelled_BT]
        logits_SNV = logits_SBTV[:, labelled_BT].float()
        label_SN1 = label_N.expand(len(logits_SNV), -1)[..., None]
        own_SN = logits_SNV.gather(2, label_SN1)[..., 0]
        self.loss += (logits_SNV.logsumexp(2) - own_SN).sum(1, dtype=torch.float64)
        best_SN, other_SN = logits_SNV.scatter(2, label_SN1, -torch.inf).max(2)
        self.accuracy += (own_SN > best_SN).sum(1)
        self.count += len(label_N)
        return TokenScores(label_N, own_SN, best_SN, other_SN)

    def compute(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Return measure -> values_S, proportion -> hits_S, and the number of labelled positions.

        Values are NaN without labelled positions, and for a member that diverged: NaN logits have no largest one.
        """
        hits_S = self.accuracy.where(~self.loss.isnan(), torch.nan)
        return {"accuracy": hits_S / self.count, "loss": self.loss / self.count}, {"accuracy": hits_S}, self.count


def predicted_tokens(logits: Tensor) -> Tensor:
    """Return the token with the largest logit, [...] of [..., V]; `NO_TOKEN` where a logit is NaN."""
    return logits.argmax(-1).where(~logits.isnan().any(-1), NO_TOKEN)


class LastStep:
    """The measures of the last training step: its logits give the accuracy without a further forward.

    Attributes:
        outcome: Outputs, labels and loss_S of the step on this rank; None before the first one. The outputs are
            logits_SBTV, or tokens_SBT that the model predicts, with `NO_TOKEN` where logits are NaN.
        resumed: The measures that stand for it in a run that has resumed and not trained yet.
    """

    def __init__(self) -> None:
        self.outcome: tuple[Tensor, Tensor, Tensor] | None = None
        self.resumed: dict[str, Tensor] | None = None

    def measures(self, strategy: Strategy) -> dict[str, Tensor] | None:
        """Return accuracy_S, NaN for members with NaN logits, and loss_S, over all ranks; every rank calls it."""
        if self.outcome is None:
            return self.resumed
        outputs, labels, loss_S = self.outcome
        predicted_SBT = outputs if outputs.dim() == 3 else predicted_tokens(outputs)
        labelled, hit = labels != IGNORE, predicted_SBT == labels
        parts = hit & labelled, labelled.expand(hit.shape), predicted_SBT == NO_TOKEN
        counts_3S = torch.stack([part.flatten(1).sum(1) for part in parts])
        hits_S, count_S, nan_S = cast(Tensor, strategy.reduce(counts_3S, reduce_op="sum"))
        mean_S = cast(Tensor, strategy.reduce(loss_S.clone(), reduce_op="mean"))  # in place on some strategies
        return {"accuracy": (hits_S / count_S).where(nan_S == 0, torch.nan), "loss": mean_S}
