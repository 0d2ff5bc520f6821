"""The delta rule with the keys, values and gates of a trained layer, without the other tokens between its writes.

Shapes: N writes, H heads, K key width, V value width.
"""

import torch
from torch import Tensor
from torch.nn.functional import normalize

from lightning_modules.groundthink.probes.retrieval import nearest, read_back, scores
from lightning_modules.groundthink.probes.writes import Writes


def two_writes(writes_N: Writes) -> dict[str, Tensor]:
    """Write needle i and then needle i + 1 into an empty state, for all i, and return means over i, by head [H].

    NaN for less than two writes.

    - `overwrite_left`: share of value i that the key of i still reads if value i + 1 is written under the same key:
      |difference to a state without value i| / |value i|. It is exp(g) beta_i |1 - beta_{i+1}|, so 0 at a beta of 1.
    - `orthogonal_loss`: change of what the key of i reads, |after - before| / |before|, if the second key is at right
      angles to it: 1 - exp(g), what the decay takes.
    - `neighbour_loss`: the same with the key that the layer has for needle i + 1.

    Args:
        writes_N: N writes, as one row.
    """
    k, v, g, beta = (x[0] for x in (writes_N.k_BTHK, writes_N.v_BTHV, writes_N.log_decay_BTH, writes_N.beta_BTH))
    if len(k) < 2:
        nothing_H = torch.full_like(g[0], torch.nan)
        return dict.fromkeys(("overwrite_left", "orthogonal_loss", "neighbour_loss"), nothing_H)
    first_k, second_k = k[:-1], k[1:]
    across = second_k - (second_k * first_k).sum(-1, keepdim=True) * first_k

    def read(second: Tensor, first_beta: Tensor) -> Tensor:
        """Return what the first key reads after each of the two writes, [N - 1, 2, H, V]."""
        pairs = torch.stack([first_k, second], 1), torch.stack([v[:-1], v[1:]], 1), torch.stack([g[:-1], g[1:]], 1)
        return Writes(*pairs, torch.stack([first_beta, beta[1:]], 1)).read(torch.stack([first_k, first_k], 1))

    def change(second: Tensor) -> Tensor:
        before, after = read(second, beta[:-1]).unbind(1)
        return _ratio(after - before, before)

    left = read(first_k, beta[:-1])[:, 1] - read(first_k, torch.zeros_like(beta[:-1]))[:, 1]
    return {
        "overwrite_left": _ratio(left, v[:-1]).mean(0),
        "orthogonal_loss": change(normalize(across, dim=-1)).mean(0),
        "neighbour_loss": change(second_k).mean(0),
    }


Curve = dict[int, tuple[Tensor, int]]


def capacity_curve(writes_N: Writes) -> Curve:
    """Return n -> (values found by each head [H], values) for n = 1, 2, 4, ... writes into an empty state, one by one.

    The N writes are split into groups of n. A value is found if it is the nearest of the n values to what its key
    reads after all n writes.

    Args:
        writes_N: N writes with different keys, as one row.
    """
    count, size = writes_N.k_BTHK.shape[1], 1
    curve: Curve = {}
    while size <= count:
        groups = count // size
        group_GN = torch.arange(groups * size, device=writes_N.k_BTHK.device).view(groups, size)
        fields = (writes_N.k_BTHK, writes_N.v_BTHV, writes_N.log_decay_BTH, writes_N.beta_BTH)
        sequence = Writes(*(x[0][group_GN] for x in fields))
        place_GN = torch.arange(size, device=group_GN.device).expand(groups, -1)
        read_GNHV = read_back(sequence, place_GN, torch.full_like(place_GN[:, 0], size))
        found_GNH = nearest(scores(read_GNHV, sequence.v_BTHV), place_GN, torch.ones_like(group_GN, dtype=torch.bool))
        curve[size] = found_GNH.sum((0, 1)).cpu(), groups * size
        size *= 2
    return curve


def capacity(curve: Curve, share: float = 0.95) -> Tensor:
    """Return the largest n up to which each head finds at least `share` of the values, [H]; 0 if there is none.

    It is NaN for a head whose reads are not finite.
    """
    found_NH = torch.stack([hits_H / count for hits_H, count in curve.values()])
    held_NH = (found_NH >= share).cumprod(0)
    most_H = (held_NH * torch.tensor(list(curve))[:, None]).amax(0).double()
    return most_H.masked_fill(found_NH.isnan().any(0), torch.nan)


def _ratio(x_NHV: Tensor, y_NHV: Tensor) -> Tensor:
    norm_NH: Tensor = y_NHV.norm(dim=-1)
    ratio_NH: Tensor = x_NHV.norm(dim=-1) / norm_NH.where(norm_NH > 0, 1.0)
    return ratio_NH
