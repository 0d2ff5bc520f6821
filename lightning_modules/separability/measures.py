"""What a residual stream carries at held-out positions: performance, amplitude and variance.

Shapes: S ensemble members, B batch, T positions, N labelled positions, V vocabulary and classes, D width.
"""

import torch
from torch import Tensor

from datamodules.batch import IGNORE
from lightning_modules.core.metrics import TokenMeasures

SUMS = ("margin", "a_act", "a_projection", "squares", "anchor_cosine", "anchor_cosine2")


class Separation(TokenMeasures):
    """Psi, A and sigma^2 over labelled positions, and the cosine with another model's residual stream.

    With x the stream that the final norm reads, z the logits, y the label, y' the best other token, W_U the
    unembedding, and the class of a position its label (n_c positions of class c, mean mu_c):

    - `accuracy` and `loss`, as in `TokenMeasures`. Psi consists of `accuracy` and `margin`, the mean of z_y - z_y'.
    - `a_act`: mean |x|. `a_projection`: mean of <x, W_U[y] - W_U[y']> / |W_U[y] - W_U[y']|.
    - `sigma2`: trace of the pooled within-class covariance, sum |x - mu_c|^2 / (N - C). `a_signal`: mean |mu_c|,
      weighted by n_c. Amplitude and variance can move apart, while a variance over all positions contains both.
    - `anchor_cosine`: mean cosine with an anchor model's stream; `anchor_cosine2`: mean of its square.

    Args:
        members: S.
        vocab_size: V.
        width: D.
    """

    margin: Tensor
    a_act: Tensor
    a_projection: Tensor
    squares: Tensor
    anchor_cosine: Tensor
    anchor_cosine2: Tensor
    counts: Tensor
    class_sums: Tensor
    anchored: Tensor

    def __init__(self, members: int, vocab_size: int, width: int):
        super().__init__(members)
        shapes: dict[str, tuple[int, ...]] = {name: (members,) for name in SUMS}
        shapes |= {"counts": (vocab_size,), "class_sums": (members, vocab_size, width), "anchored": ()}
        for name, shape in shapes.items():
            self.add_state(name, torch.zeros(shape, dtype=torch.float64), dist_reduce_fx="sum")

    def update(  # type: ignore[override]  # the stream is an input that other measures do not have
        self,
        logits_SBTV: Tensor,
        x_SBTD: Tensor,
        labels_BT: Tensor,
        unembed_SVD: Tensor,
        cosine_SBT: Tensor | None = None,
    ) -> None:
        """Add a batch whose labels all members share.

        Args:
            logits_SBTV: Logits.
            x_SBTD: The residual stream.
            labels_BT: Labels.
            unembed_SVD: The unembedding of each member.
            cosine_SBT: The cosine with the anchor's stream.
        """
        label_N, own_SN, best_SN, other_SN = self.add_scores(logits_SBTV, labels_BT)
        labelled_BT = labels_BT != IGNORE
        x_SND = x_SBTD[:, labelled_BT].float()
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
        if cosine_SBT is not None:
            cosine_SN = cosine_SBT[:, labelled_BT].double()
            self.anchor_cosine += cosine_SN.sum(1)
            self.anchor_cosine2 += cosine_SN.square().sum(1)
            self.anchored += 1

    def compute(self) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
        """Return measure -> values_S, proportion -> hits_S, and N; NaN where there is nothing to measure."""
        means, hits, count = super().compute()
        names = [name for name in SUMS if self.anchored or not name.startswith("anchor")]
        means |= {name: getattr(self, name) / count for name in names if name != "squares"}
        seen_V = self.counts > 0
        length_SC = self.class_sums[:, seen_V].norm(dim=2)  # n_c |mu_c|
        between_S = (length_SC.square() / self.counts[seen_V]).sum(1)
        means["sigma2"] = (self.squares - between_S).clamp(min=0) / (count - seen_V.sum())
        means["a_signal"] = length_SC.sum(1) / count
        return means, hits, count


def position_overlap(position_STD: Tensor) -> Tensor:
    """Root mean square cosine between the vectors of different positions, [S].

    At least sqrt((T - D) / (D (T - 1))) where T > D (Welch 1974). Up to this bound, overlap
    follows from the geometry and is not learned.
    """
    unit_STD = torch.nn.functional.normalize(position_STD.double(), dim=2)
    gram_STT = unit_STD @ unit_STD.mT
    length = position_STD.shape[1]
    off_diagonal_S = gram_STT.square().sum((1, 2)) - gram_STT.diagonal(dim1=1, dim2=2).square().sum(1)
    return (off_diagonal_S / (length * (length - 1))).clamp(min=0).sqrt()
