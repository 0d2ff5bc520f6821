"""Self-retrieval: whether the state gives a value back to the key under which it was written.

Shapes: B rows, T positions, N needles per row, H heads, K key width, V value width.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

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


def nearest(read_BNHV: Tensor, v_BNHV: Tensor, present_BN: Tensor) -> Tensor:
    """Return whether the value of the same needle is nearest to what each key reads, bool [B, N].

    Nearest among the row's values by the sum of the cosines of all heads, which the output of the mixer all uses.

    Args:
        read_BNHV: What the keys read.
        v_BNHV: What was written.
        present_BN: The needles that exist.
    """
    read_BHNV, v_BHNV = (normalize(x, dim=-1).transpose(1, 2) for x in (read_BNHV, v_BNHV))
    score_BNN = (read_BHNV @ v_BHNV.mT).sum(1).masked_fill(~present_BN[:, None], -torch.inf)
    own_BN = score_BNN.diagonal(dim1=1, dim2=2)
    others_BNN = score_BNN.masked_fill(
        torch.eye(score_BNN.shape[1], dtype=torch.bool, device=own_BN.device), -torch.inf
    )
    return (own_BN > others_BNN.amax(2)) & present_BN
