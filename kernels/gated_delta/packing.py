"""Sequences of several lengths, packed one behind the other in a batch of one."""

import torch
from torch import Tensor


class Packing:
    """The map between packed rows [1, T, ...] and one row per sequence [N, L, ...], with L the longest length.

    Args:
        cu_seqlens: Bounds of the sequences, [N + 1]: 0, and where each ends. None: the rows are the sequences.
    """

    def __init__(self, cu_seqlens: Tensor | None):
        self.bounds = None if cu_seqlens is None else cu_seqlens.long()

    def unpack(self, x: Tensor) -> Tensor:
        """Return one row per sequence; zeros follow the shorter ones, and change nothing."""
        if self.bounds is None:
            return x
        lengths = self.bounds.diff()
        positions = torch.arange(max(int(lengths.max()), 1), device=x.device)
        inside = positions < lengths[:, None]
        rows = (self.bounds[:-1, None] + positions).where(inside, 0)
        row = x[0] if x.shape[1] else x.new_zeros(1, *x.shape[2:])  # an empty row has nothing to gather
        return _masked(row[rows], inside)

    def pack(self, x: Tensor, length: int) -> Tensor:
        """Return the packed row [1, length, ...]; positions after the last sequence are zero."""
        if self.bounds is None:
            return x[:, :length]
        positions = torch.arange(length, device=x.device)
        sequence = (torch.searchsorted(self.bounds, positions, right=True) - 1).clamp(max=len(self.bounds) - 2)
        inside = positions < self.bounds[-1]
        place = (positions - self.bounds[sequence]).where(inside, 0)
        return _masked(x[sequence, place], inside)[None]


def _masked(x: Tensor, inside: Tensor) -> Tensor:
    """Return x [..., *rest] with zeros where `inside` [...] is false; a product would keep an inf or NaN there."""
    return x.where(inside.view(*inside.shape, *[1] * (x.dim() - inside.dim())), 0)
