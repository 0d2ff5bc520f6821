"""Self-retrieval: whether the state gives a value back to the key under which it was written.

Shapes: B rows, T positions, N needles per row, H heads, K key width, V value width.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_modules.core.metrics import strictly_above
from lightning_modules.groundthink.probes.writes import Writes


def read_back(writes: Writes, place_BN: Tensor, end_B: Tensor) -> Tensor:
    """Return what the keys written at some positions read from the state before position `end_B`, [B, N, H, V]."""
    return torch.einsum("bnhk,bhkv->bnhv", writes.at(place_BN).k_BTHK, writes.state_before(end_B))


def read_later(writes: Writes, place_BN: Tensor, later: int) -> Tensor:
    """Return what the key of each needle reads right after the write `later` needles on, [B, N - later, H, V]."""
    k_BNHK = writes.at(place_BN).k_BTHK
    count = place_BN.shape[1] - later
    then_BM, row_B1 = place_BN[:, later:], torch.arange(len(place_BN), device=place_BN.device)[:, None]
    q_BTHK = torch.zeros_like(writes.k_BTHK)
    q_BTHK[row_B1, then_BM] = k_BNHK[:, :count]
    return writes.read(q_BTHK)[row_B1, then_BM]


def cosines(read_BNHV: Tensor, v_BNHV: Tensor) -> Tensor:
    """Return the cosine of what was read with what was written, [B, N, H]; 0 where nothing was."""
    return (normalize(read_BNHV, dim=-1) * normalize(v_BNHV, dim=-1)).sum(-1)


def nearest(score_BMHN: Tensor, own_BM: Tensor, present_BN: Tensor) -> Tensor:
    """Return 1 where a read has its strictly highest score with the needle that it should find, else 0, [B, M, H].

    It is NaN where a score is NaN.

    Args:
        score_BMHN: Scores of M reads per row with the N values of the row, such as cosines.
        own_BM: The needle that each read should find.
        present_BN: The needles that exist; a read that should find another one finds nothing.
    """
    score_BMHN = score_BMHN.masked_fill(~present_BN[:, None, None], -torch.inf)
    own_BMHN = torch.zeros_like(score_BMHN, dtype=torch.bool)
    own_BMHN.scatter_(3, own_BM[..., None, None].expand(*score_BMHN.shape[:3], 1), True)
    best_BMH = score_BMHN.masked_fill(own_BMHN, -torch.inf).amax(3)
    own_BMH = score_BMHN.masked_fill(~own_BMHN, -torch.inf).amax(3)
    return strictly_above(own_BMH, best_BMH)


def scores(read_BMHV: Tensor, v_BNHV: Tensor) -> Tensor:
    """Return the cosine of each read with each value of its row, [B, M, H, N]; 0 for zero vectors."""
    return torch.einsum("bmhv,bnhv->bmhn", normalize(read_BMHV, dim=-1), normalize(v_BNHV, dim=-1))
