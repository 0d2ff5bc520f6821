"""All measures of the state of one gated delta mixer on a batch of rows with needles.

Shapes: B rows, T positions, N needles per row, Q queries of all rows, L lags, H heads, K key width, V value width, R
singular values.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from datamodules.batch import TokenBatch
from lightning_modules.core.spectrum import rank_of, singular_values
from lightning_modules.groundthink.probes.delta_rule import Curve, capacity, capacity_curve, two_writes
from lightning_modules.groundthink.probes.keys import mean_absolute_cosine
from lightning_modules.groundthink.probes.needles import Queries, first_queries, places, roles
from lightning_modules.groundthink.probes.retrieval import cosines, nearest, read_back, read_later, scores
from lightning_modules.groundthink.probes.writes import Writes

LAGS = 5  # positions from a needle's key on where its write may be: convolutions carry the key and the value on


@dataclass(frozen=True)
class _Needles:
    """Positions of keys and of writes, and which needles exist, [B, N]."""

    key_BN: Tensor
    place_BN: Tensor
    present_BN: Tensor


@dataclass(frozen=True)
class GateTrace:
    """The gates along one row, on the CPU.

    Attributes:
        forgotten_TH: 1 - exp(g), the share of the state that the decay takes.
        beta_TH: Writing strength.
        places: Role -> positions; `write` is one of the roles.
    """

    forgotten_TH: Tensor
    beta_TH: Tensor
    places: dict[str, list[int]]


@dataclass(frozen=True)
class StateMeasures:
    """What a mixer's gates, keys and state do; positions, needles, queries and rows have one weight each.

    A layer writes a needle where its convolutions have the key in k and the value in v, which may be some positions
    behind the key: the lag. Lag and head are those at which queries and the keys of their needles are most alike.

    Attributes:
        lag: Positions from the needle's key to the write.
        head: The head with the most alike queries and keys.
        by_head: Measure -> value by head [H], on the CPU:
            - `query_match`: mean cosine of a query with the key of its needle's write;
            - `decay_<role>` and `beta_<role>`: mean of exp(g) and of beta at the tokens of a role and at the write;
            - `key_cosine`: mean |cosine| of the keys of two positions of a row; `key_cosine_needles` of the writes of
              two needles, `key_cosine_filler` of the write of a needle and of one of filler;
            - `effective_rank` and `top_singular_value` of the state before the first query;
            - `self_retrieval_cosine`: cosine of a needle's value with what its key reads before the first query;
            - `self_retrieval`: share of needles of whose row no other value is as near to what the key reads;
            - `query_retrieval`: the same for what the query reads;
            - `cosine_after_<r>`: cosine of a needle's value with what its key reads after r later needles;
            - `overwrite_left`, `orthogonal_loss`, `neighbour_loss`: see `delta_rule.two_writes`;
            - `capacity`: see `delta_rule.capacity`.
        counts: Needles of `self_retrieval`, and queries of `query_retrieval`.
        capacity_curve: See `delta_rule.capacity_curve`; needles of all rows, with different keys and values.
        spectrum_HR: Singular values of the state before the first query, as means over rows, on the CPU.
        trace: The gates along the first row.
    """

    lag: int
    head: int
    by_head: dict[str, Tensor]
    counts: dict[str, int]
    capacity_curve: Curve
    spectrum_HR: Tensor
    trace: GateTrace

    @property
    def values(self) -> dict[str, float]:
        """Each measure of the head, the head and the lag."""
        values = {name: float(x_H[self.head]) for name, x_H in self.by_head.items()}
        return values | {"head": float(self.head), "write_lag": float(self.lag)}


def measure_state(batch: TokenBatch, sites: Mapping[str, Tensor], shifted: bool, values: range) -> StateMeasures:
    """Return the measures of one mixer, of one ensemble member.

    Args:
        batch: Rows with at least one needle and one query each.
        sites: The outputs of the mixer's sites in `writes.SITES` on these rows.
        shifted: Whether the mixer writes values under the key of the position before.
        values: The tokens that are values.
    """
    writes, role, queries = Writes.of(sites, shifted), roles(batch, values), Queries.of(batch)
    q_BTHK = normalize(sites["query"].to(writes.k_BTHK.dtype), dim=-1)
    match_LH = query_match(writes, q_BTHK, queries)
    lag, head = divmod(int(match_LH.argmax()), match_LH.shape[1])
    key_BN, present_BN = places(role["key"])
    place_BN = (key_BN + lag).clamp(max=role["key"].shape[1] - 1)
    needles = _Needles(key_BN, place_BN, present_BN)
    written_BT = torch.zeros_like(role["key"]).scatter(1, place_BN, present_BN)
    role["filler"] &= ~written_BT
    # Before the first query; a write may come with it, if a row has no filler
    last_B = torch.where(present_BN, place_BN, 0).amax(1)
    end_B = torch.maximum(first_queries(batch["labels"]), last_B + 1)

    by_head = {"query_match": match_LH[lag]}
    for name, mask_BT in (role | {"write": written_BT}).items():
        beta_BTH = writes.beta_BTH if name == "write" else sites["gates.beta"]
        by_head |= {
            f"decay_{name}": writes.log_decay_BTH.exp()[mask_BT].mean(0),
            f"beta_{name}": beta_BTH[mask_BT].mean(0),
        }
    everywhere_BT = torch.ones_like(written_BT)
    pairs = {
        "key_cosine": (everywhere_BT, everywhere_BT),
        "key_cosine_needles": (written_BT, written_BT),
        "key_cosine_filler": (written_BT, role["filler"]),
    }
    by_head |= {name: mean_absolute_cosine(writes.k_BTHK, *masks) for name, masks in pairs.items()}
    spectrum_BHR = singular_values(writes.state_before(end_B))
    by_head["effective_rank"] = rank_of(spectrum_BHR).mean(0)
    by_head["top_singular_value"] = spectrum_BHR[..., 0].mean(0)
    by_head |= _retrieval(writes, q_BTHK, queries, needles, end_B)
    different = _different(writes, batch["tokens"], needles)
    curve = capacity_curve(different)
    by_head |= two_writes(different) | {"capacity": capacity(curve)}
    by_head = {name: x_H.float().cpu() for name, x_H in by_head.items()}
    counts = {"self_retrieval": int(present_BN.sum()), "query_retrieval": len(queries.row_Q)}
    first = {name: mask_BT[0].nonzero()[:, 0].tolist() for name, mask_BT in (role | {"write": written_BT}).items()}
    trace = GateTrace(-writes.log_decay_BTH[0].expm1().cpu(), sites["gates.beta"][0].float().cpu(), first)
    return StateMeasures(lag, head, by_head, counts, curve, spectrum_BHR.mean(0).cpu(), trace)


def query_match(writes: Writes, q_BTHK: Tensor, queries: Queries) -> Tensor:
    """Return the mean cosine of queries with the keys written l positions after their needles' keys, [L, H]."""
    asked_QHK = q_BTHK[queries.row_Q, queries.time_Q]
    matches = []
    for lag in range(LAGS):
        k_QHK = writes.k_BTHK[queries.row_Q, (queries.place_Q + lag).clamp(max=q_BTHK.shape[1] - 1)]
        matches.append((asked_QHK * k_QHK).sum(-1).mean(0))
    return torch.stack(matches)


def _retrieval(writes: Writes, q_BTHK: Tensor, queries: Queries, needles: _Needles, end_B: Tensor) -> dict[str, Tensor]:
    place_BN, present_BN = needles.place_BN, needles.present_BN
    count, v_BNHV = place_BN.shape[1], writes.at(place_BN).v_BTHV
    read_BNHV = read_back(writes, place_BN, end_B)
    own_BN = torch.arange(count, device=place_BN.device).expand_as(place_BN)
    found_BNH = nearest(scores(read_BNHV, v_BNHV), own_BN, present_BN)
    own_BT = torch.zeros_like(q_BTHK[..., 0, 0], dtype=torch.long)
    own_BT[queries.row_Q, queries.time_Q] = queries.needle(needles.key_BN)
    answered_BTH = nearest(scores(writes.read(q_BTHK), v_BNHV), own_BT, present_BN)
    by_head = {
        "self_retrieval_cosine": cosines(read_BNHV, v_BNHV)[present_BN].mean(0),
        "self_retrieval": found_BNH[present_BN].mean(0),
        "query_retrieval": answered_BTH[queries.row_Q, queries.time_Q].mean(0),
    }
    for later in [0, *(2**power for power in range((count - 1).bit_length()))]:  # 0, 1, 2, 4, ..., below N
        cosine_BMH = cosines(read_later(writes, place_BN, later), v_BNHV[:, : count - later])
        by_head[f"cosine_after_{later}"] = cosine_BMH[present_BN[:, later:]].mean(0)
    return by_head


def _different(writes: Writes, tokens_BT: Tensor, needles: _Needles) -> Writes:
    """Return writes of all rows, as one row, no two of which have the same key token or the same value token."""
    row_W, needle_W = needles.present_BN.nonzero(as_tuple=True)
    key_W = needles.key_BN[row_W, needle_W]
    chosen = np.arange(len(row_W))
    for token_W in (tokens_BT[row_W, key_W], tokens_BT[row_W, key_W + 1]):
        _, first = np.unique(token_W.cpu().numpy()[chosen], return_index=True)
        chosen = chosen[np.sort(first)]
    place_W = needles.place_BN[row_W, needle_W]
    row_C, place_C = (x[torch.from_numpy(chosen).to(x.device)] for x in (row_W, place_W))
    fields = (writes.k_BTHK, writes.v_BTHV, writes.log_decay_BTH, writes.beta_BTH)
    return Writes(*(x[row_C, place_C][None] for x in fields))
