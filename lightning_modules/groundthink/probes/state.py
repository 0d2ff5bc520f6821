"""All measures of the state of one gated delta mixer on a batch of rows with needles.

Shapes: B rows, T positions, N needles per row, H heads, K key width, V value width, R singular values.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from datamodules.batch import TokenBatch
from lightning_modules.groundthink.probes.delta_rule import capacity, capacity_curve, two_writes
from lightning_modules.groundthink.probes.keys import mean_absolute_cosine
from lightning_modules.groundthink.probes.needles import first_queries, places, roles
from lightning_modules.groundthink.probes.retrieval import cosines, nearest, read_back, read_later
from lightning_modules.groundthink.probes.spectrum import effective_rank, singular_values
from lightning_modules.groundthink.probes.writes import Writes


@dataclass(frozen=True)
class StateMeasures:
    """What a mixer's gates, keys and state do; positions, needles and rows have one weight each.

    Attributes:
        by_head: Measure -> value by head [H], on the CPU:
            - `decay_<role>` and `beta_<role>`: mean of exp(g) and of beta at keys, values, queries and filler. The
              write of a needle is the one at its value, after which the convolution has seen the key;
            - `key_cosine`: mean |cosine| of the keys of two positions of a row; `key_cosine_needles` of the writes of
              two needles, `key_cosine_filler` of the write of a needle and of one of filler;
            - `effective_rank` and `top_singular_value` of the state before the first query;
            - `self_retrieval_cosine`: cosine of each needle's value with what its key reads before the first query;
            - `overwrite_left`, `orthogonal_loss`, `neighbour_loss`: see `delta_rule.two_writes`.
        retrieved: Needles whose value is nearest to what their key reads before the first query, and all needles.
        later: r -> cosine of a needle's value with what its key reads after r later needles, by head [H].
        capacity_curve: See `delta_rule.capacity_curve`; different keys of all rows.
        spectrum_HR: Singular values of the state before the first query, as means over rows, on the CPU.
    """

    by_head: dict[str, Tensor]
    retrieved: tuple[int, int]
    later: dict[int, Tensor]
    capacity_curve: dict[int, tuple[int, int]]
    spectrum_HR: Tensor

    @property
    def values(self) -> dict[str, float]:
        """Each measure as one number: means over heads, `cosine_after_<r>`, `self_retrieval` and `capacity`."""
        means = {name: float(x_H.mean()) for name, x_H in self.by_head.items()}
        means |= {f"cosine_after_{later}": float(x_H.mean()) for later, x_H in self.later.items()}
        hits, count = self.retrieved
        return means | {"self_retrieval": hits / count, "capacity": float(capacity(self.capacity_curve))}


def measure_state(batch: TokenBatch, sites: Mapping[str, Tensor], shifted: bool, values: range) -> StateMeasures:
    """Return the measures of one mixer, of one ensemble member.

    Args:
        batch: Rows with at least one needle each.
        sites: The outputs of the mixer's sites in `writes.SITES` on these rows.
        shifted: Whether the mixer writes values under the key of the position before.
        values: The tokens that are values.
    """
    writes, role = Writes.of(sites, shifted), roles(batch, values)
    place_BN, present_BN = places(role["value"])
    end_B = first_queries(batch["labels"])
    v_BNHV = writes.at(place_BN).v_BTHV
    read_BNHV = read_back(writes, place_BN, end_B)
    spectrum_BHR = singular_values(writes.state_before(end_B))
    by_head = {f"decay_{name}": writes.log_decay_BTH.exp()[mask_BT].mean(0) for name, mask_BT in role.items()}
    by_head |= {f"beta_{name}": sites["gates.beta"][mask_BT].mean(0) for name, mask_BT in role.items()}
    everywhere_BT = torch.ones_like(role["value"])
    pairs = {
        "key_cosine": (everywhere_BT, everywhere_BT),
        "key_cosine_needles": (role["value"], role["value"]),
        "key_cosine_filler": (role["value"], role["filler"]),
    }
    by_head |= {name: mean_absolute_cosine(writes.k_BTHK, *masks) for name, masks in pairs.items()}
    by_head["effective_rank"] = effective_rank(spectrum_BHR).mean(0)
    by_head["top_singular_value"] = spectrum_BHR[..., 0].mean(0)
    by_head["self_retrieval_cosine"] = cosines(read_BNHV, v_BNHV)[present_BN].mean(0)
    different = _with_different_keys(writes, batch["tokens"], role["value"])
    by_head |= two_writes(different)
    return StateMeasures(
        {name: x_H.float().cpu() for name, x_H in by_head.items()},
        (int(nearest(read_BNHV, v_BNHV, present_BN).sum()), int(present_BN.sum())),
        _by_age(writes, place_BN, present_BN),
        capacity_curve(different),
        spectrum_BHR.mean(0).cpu(),
    )


def _by_age(writes: Writes, place_BN: Tensor, present_BN: Tensor) -> dict[int, Tensor]:
    v_BNHV, needles = writes.at(place_BN).v_BTHV, place_BN.shape[1]
    by_age = {}
    for later in [0, *(2**power for power in range((needles - 1).bit_length()))]:  # 0, 1, 2, 4, ..., below N
        read_BMHV = read_later(writes, place_BN, later)
        cosine_BMH = cosines(read_BMHV, v_BNHV[:, : needles - later])
        by_age[later] = cosine_BMH[present_BN[:, later:]].mean(0).float().cpu()
    return by_age


def _with_different_keys(writes: Writes, tokens_BT: Tensor, value_BT: Tensor) -> Writes:
    """Return the first write of each key token over all rows, as one row."""
    row_W, place_W = value_BT.nonzero(as_tuple=True)
    _, first = np.unique(tokens_BT[row_W, place_W - 1].cpu().numpy(), return_index=True)
    chosen = torch.from_numpy(np.sort(first)).to(row_W.device)
    fields = (writes.k_BTHK, writes.v_BTHV, writes.log_decay_BTH, writes.beta_BTH)
    return Writes(*(x[row_W[chosen], place_W[chosen]][None] for x in fields))
