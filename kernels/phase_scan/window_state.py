"""The state after the last positions with a window and without decay, from these positions alone."""

import torch
from torch import Tensor

from kernels.phase_scan.reference import turn


def last_terms(
    x: Tensor,
    omega: Tensor,
    mass: Tensor | None,
    write_offset: Tensor | None,
    initial_state: Tensor | None,
    window: int,
    cu_seqlens: Tensor | None,
) -> Tensor:
    """Return what each of the last W - 1 positions wrote, turned to the last position: [N, W - 1, 2, D] in fp32.

    This is the `last_state` of `recurrence.py` without a scan over the whole sequence; see `phase_scan` for the
    arguments. Terms of the initial state are left where a sequence is shorter than W - 1 positions.
    """
    B, T, D = x.shape
    bounds = torch.arange(B + 1, device=x.device) * T if cu_seqlens is None else cu_seqlens.long()
    places_NK = bounds[1:, None] + torch.arange(1 - window, 0, device=x.device)
    inside_NK1 = (places_NK >= bounds[:-1, None])[:, :, None]

    def last(v: Tensor) -> Tensor:
        rows = (
            v.flatten(0, 1)[places_NK.clamp(min=0, max=max(B * T - 1, 0))] if B * T else v.new_zeros(inside_NK1.shape)
        )
        return rows.float().where(inside_NK1, 0)

    write_NKD = last(x) if mass is None else last(x) * last(mass)
    turns_NKD = last(omega).double()
    later_NKD = turns_NKD.flip(1).cumsum(1).flip(1) - turns_NKD
    phase_NKD = -later_NKD if write_offset is None else last(write_offset) - later_NKD
    phase_NKD = torch.remainder(phase_NKD, 2 * torch.pi).float()
    term_NKD = turn(write_NKD, phase_NKD)
    if initial_state is not None:
        terms_NKD = torch.complex(*initial_state.unbind(2))
        before_NK1 = (places_NK - bounds[:-1, None] + window - 1).clamp(0, max(window - 2, 0))[:, :, None]
        passed = terms_NKD.gather(1, before_NK1.expand(-1, -1, D)) if window > 1 else terms_NKD
        term_NKD = term_NKD.where(inside_NK1, turn(passed, phase_NKD))
    return torch.stack((term_NKD.real, term_NKD.imag), 2)
