"""Keys and strengths of what a mixer writes, for measures of a forward.

Shapes: B batch, T positions, H heads, K key width.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize


class Writes:
    """Keys and writing strengths of a forward, as the penalties need them.

    Args:
        form: Form of the overlap.
    """

    def __init__(self, form: Literal["squared", "absolute"]):
        self.form: Literal["squared", "absolute"] = form
        self._kept: list[tuple[Tensor, Tensor]] | None = None

    def open(self) -> None:
        """Measure the writes from here on."""
        self._kept = []

    def add(self, k_BTHK: Tensor, beta_BTH: Tensor) -> None:
        """Measure the writes of a mixer, if the forward that is running measures any."""
        if self._kept is not None:
            self._kept.append((key_overlap(k_BTHK, self.form), beta_BTH.mean()))

    def close(self) -> tuple[Tensor, Tensor]:
        """Return the overlap of keys and the mean beta, both a mean over mixers, and measure no longer."""
        assert self._kept is not None  # `open` comes first
        overlaps, betas = zip(*self._kept, strict=True)
        self._kept = None
        return torch.stack(overlaps).mean(), torch.stack(betas).mean()


def key_overlap(k_BTHK: Tensor, form: Literal["squared", "absolute"]) -> Tensor:
    """Return the mean of cos^2 or |cos| over all pairs of keys of one row and head; random keys have 1 / K in cos^2.

    The sum of cos^2 over pairs is |sum_t k_t k_t^T|^2, so it needs no matrix of pairs.
    """
    with torch.autocast(k_BTHK.device.type, enabled=False):
        k_BTHK = normalize(k_BTHK.to(torch.promote_types(k_BTHK.dtype, torch.float32)), dim=-1)
        T = k_BTHK.shape[1]
        if form == "squared":
            sum_BH = torch.einsum("bthk,bthj->bhkj", k_BTHK, k_BTHK).square().sum((2, 3))
        else:
            sum_BH = torch.einsum("bthk,bshk->bhts", k_BTHK, k_BTHK).abs().sum((2, 3))
        return (sum_BH.mean() - T) / max(1, T * (T - 1))
