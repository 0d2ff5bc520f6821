"""What a residual stream carries, measured over held-out positions: performance, amplitude, variance.

Shapes: S members, B batch, T positions, N labelled positions, V vocabulary and classes, D width.
"""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torchmetrics import Metric

from datamodules.batch import IGNORE


def member_losses(logits_SBTV: Tensor, labels: Tensor, double: bool = False) -> Tensor:
    """Mean cross-entropy over each member's labelled positions, in nats, [S], 0 without any; in fp32 or fp64.

    Args:
        logits_SBTV: Logits.
        labels: [S, B, T], or [B, T] for all members the same.
        double: Whether in fp64; softmax collapse, the rounding of small losses to zero, is out of the way there.
    """
    labels_SN = labels.expand(logits_SBTV.shape[:3]).flatten(1)
    logits_NV = logits_SBTV.flatten(0, 2)
    losses = cross_entropy(
        logits_NV.double() if double else logits_NV.float(), labels_SN.flatten(), ignore_index=IGNORE, reduction="none"
    )
    return losses.view(labels_SN.shape).sum(1) / (labels_SN != IGNORE).sum(1).clamp(min=1)


class Separation(Metric):
    """Psi, A and sigma^2 over labelled positions, and the cosine with another model's residual stream.

    With x the stream that the final norm reads, z the logits, y the label, y' the best other token, W_U the
    unembedding, and the class of a position its label (n_c positions of class c, mean mu_c):

    - `accuracy`: share of positions with argmax z = y. Psi, with `margin`: mean of z_y - z_y'; `loss`: cross-entropy.
    - `a_act`: mean |x|. `a_projection`: mean of <x, W_U[y] - W_U[y']> / |W_U[y] - W_U[y']|.
    - `sigma2`: trace of the pooled within-class covariance, sum |x - mu_c|^2 / (N - C). `a_signal`: mean |mu_c|,
      weighed by n_c. Amplitude and variance can thus move apart; a variance over everything would hold both.
    - `anchor_cosine`: mean of the cosine with an anchor model's stream; `anchor_cosine2`: mean of its square.

    `compute` gives each as [S], and the number of positions, over all ranks; sums are in fp64.

    Args:
        members: S.
        vocab_size: V.
        width: D.
    """

    full_state_update = False
    higher_is_better = None

    def __init__(self, members: int, vocab_size: int, width: int):
        super().__init__()
        sums = ("accuracy", "margin", "loss", "a_act", "a_projection", "squares", "anchor_cosine", "anchor_cosine2")
        shapes = {name: (members,) for name in sums}
        shapes |= {"counts": (vocab_size,), "class_sums": (members, vocab_size, width), "anchored": ()}
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")
        self.names = sums

    def update(
        self, logits_SBTV: Tensor, x_SBTD: Tensor, labels_BT: Tensor, unembed_SVD: Tensor, cosine: Tensor | None = None
    ) -> None:
        """Count a batch, whose labels all members share; `cosine` is that with the anchor, [S, B, T]."""
        labelled_BT = labels_BT != IGNORE
        label_N = labels_BT[labelled_BT]
        logits_SNV, x_SND = logits_SBTV[:, labelled_BT].float(), x_SBTD[:, labelled_BT].float()
        label_SN1 = label_N.expand(len(x_SND), -1)[..., None]
        own_SN = logits_SNV.gather(2, label_SN1)[..., 0]
        self.loss += (logits_SNV.logsumexp(2) - own_SN).sum(1, dtype=torch.float64)
        best_SN, other_SN = logits_SNV.scatter(2, label_SN1, -torch.inf).max(2)
        self.accuracy += (own_SN > best_SN).sum(1)
        self.margin += (own_SN - best_SN).sum(1, dtype=torch.float64)
        member_S1 = torch.arange(len(x_SND), device=x_SND.device)[:, None]
        direction_SND = unembed_SVD[:, label_N] - unembed_SVD[member_S1, other_SN]
        projection_SN = (x_SND * direction_SND).sum(2) / direction_SND.norm(dim=2).clamp(min=1e-12)
        self.a_projection += projection_SN.sum(1, dtype=torch.float64)
        norm_SN = x_SND.double().norm(dim=2)
        self.a_act += norm_SN.sum(1)
        self.squares += norm_SN.square().sum(1)
        self.counts += torch.bincount(label_N, minlength=len(self.counts))
        self.class_sums.index_add_(1, label_N, x_SND.double())
        if cosine is not None:
            cosine_SN = cosine[:, labelled_BT].double()
            self.anchor_cosine += cosine_SN.sum(1)
            self.anchor_cosine2 += cosine_SN.square().sum(1)
            self.anchored += 1

    def compute(self) -> tuple[dict[str, Tensor], Tensor]:
        """Measure -> values_S, NaN where there is nothing to measure; and N."""
        n, seen_V = self.counts.sum(), self.counts > 0
        means = {name: getattr(self, name) / n for name in self.names}
        if not self.anchored:
            del means["anchor_cosine"], means["anchor_cosine2"]
        length_SC = self.class_sums[:, seen_V].norm(dim=2)  # n_c |mu_c|
        between_S = (length_SC.square() / self.counts[seen_V]).sum(1)
        means["sigma2"] = (self.squares - between_S).clamp(min=0) / (n - seen_V.sum())
        means["a_signal"] = length_SC.sum(1) / n
        del means["squares"]
        return means, n


def position_overlap(position_STD: Tensor) -> Tensor:
    """Root mean square cosine between the vectors of different positions, [S].

    At least sqrt((T - D) / (D (T - 1))) where T > D (Welch 1974): so far, crowding is geometry and not learned.
    """
    unit_STD = torch.nn.functional.normalize(position_STD.double(), dim=2)
    gram_STT = unit_STD @ unit_STD.mT
    length = position_STD.shape[1]
    off_diagonal_S = gram_STT.square().sum((1, 2)) - gram_STT.diagonal(dim1=1, dim2=2).square().sum(1)
    return (off_diagonal_S / (length * (length - 1))).clamp(min=0).sqrt()
