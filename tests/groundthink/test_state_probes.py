"""The probes of the state against loops over positions, and against what the delta rule must give."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from datamodules import NeedleGym
from datamodules.batch import IGNORE, TokenBatch
from datamodules.sequence_task import collate
from lightning_modules.core.spectrum import rank_of, singular_values
from lightning_modules.groundthink import GroundThink
from lightning_modules.groundthink.probes.delta_rule import capacity, capacity_curve, two_writes
from lightning_modules.groundthink.probes.keys import mean_absolute_cosine, random_cosine
from lightning_modules.groundthink.probes.needles import Queries, first_queries
from lightning_modules.groundthink.probes.retrieval import cosines, nearest, read_back, read_later, scores
from lightning_modules.groundthink.probes.state import LAGS, measure_state, query_match
from lightning_modules.groundthink.probes.writes import SITES, Writes

B, T, H, K, V = 3, 12, 2, 8, 4


def rows(**options) -> TokenBatch:
    knobs = {"needles": 3, "seq_len": 20, "vocab_size": 40, "seed": 0} | options
    return collate(NeedleGym(**knobs).fixed("test", B))


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make_sites() -> dict[str, Tensor]:
    shapes = {"key": (K,), "value": (V,), "gates.log_decay": (), "gates.beta": ()}
    sites = {name: random(B, T, H, *shape, seed=i) for i, (name, shape) in enumerate(shapes.items())}
    sites["gates.log_decay"] = -sites["gates.log_decay"].abs() / 10
    sites["gates.beta"] = sites["gates.beta"].sigmoid()
    return sites


def states(sites: dict[str, Tensor], shifted: bool = False) -> Tensor:
    """The state after each position, [B, T, H, K, V], by the rule as it is written down."""
    state, after = torch.zeros(B, H, K, V, dtype=torch.float64), []
    for t in range(T):
        k, beta = sites["key"][:, t], sites["gates.beta"][:, t]
        if shifted:
            k, beta = sites["key"][:, t - 1], sites["gates.beta"][:, t - 1] * (t > 0)
        k = normalize(k, dim=-1)
        state = state * sites["gates.log_decay"][:, t].exp()[..., None, None]
        error = sites["value"][:, t] - torch.einsum("bhkv,bhk->bhv", state, k)
        state = state + torch.einsum("bhk,bhv->bhkv", k, error * beta[..., None])
        after.append(state)
    return torch.stack(after, 1)


@pytest.mark.parametrize("shifted", [False, True])
def test_reads_and_states_are_those_of_the_rule(shifted):
    sites = make_sites()
    writes, expected_BTHKV = Writes.of(sites, shifted), states(sites, shifted)
    q_BTHK = random(B, T, H, K, seed=9)
    torch.testing.assert_close(writes.read(q_BTHK), torch.einsum("bthk,bthkv->bthv", q_BTHK, expected_BTHKV))
    before = writes.state_before(torch.tensor([0, 5, T]))
    torch.testing.assert_close(before[1:], torch.stack([expected_BTHKV[1, 4], expected_BTHKV[2, -1]]))
    assert (before[0] == 0).all()


def test_what_written_keys_read_back():
    sites = make_sites()
    writes, after_BTHKV = Writes.of(sites, False), states(sites)
    place_BN, end_B = torch.tensor([[1, 4, 6], [0, 3, 5], [2, 5, 7]]), torch.tensor([8, 6, 12])
    k_BTHK = normalize(sites["key"], dim=-1)
    read_BNHV = read_back(writes, place_BN, end_B)
    for b, n in np.ndindex(B, 3):
        expected = torch.einsum("hk,hkv->hv", k_BTHK[b, place_BN[b, n]], after_BTHKV[b, end_B[b] - 1])
        torch.testing.assert_close(read_BNHV[b, n], expected)
    for later in range(3):
        read = read_later(writes, place_BN, later)
        assert read.shape[1] == 3 - later
        for b, n in np.ndindex(B, 3 - later):
            key, then = k_BTHK[b, place_BN[b, n]], place_BN[b, n + later]
            torch.testing.assert_close(read[b, n], torch.einsum("hk,hkv->hv", key, after_BTHKV[b, then]))


def test_the_nearest_value_is_sought_among_needles_that_exist():
    read, values = random(B, 5, H, V), random(B, 4, H, V, seed=1)
    read[:, 1] += 3 * values[:, 2]
    own = torch.tensor([0, 2, 1, 3, 2]).expand(B, -1)
    present = torch.tensor([[True] * 4, [True] * 4, [True, True, False, False]])
    got = nearest(scores(read, values), own, present)
    for b, m, h in np.ndindex(B, 5, H):
        cosine = {n: float(cosine_similarity(read[b, m, h], values[b, n, h], dim=0)) for n in range(4) if present[b, n]}
        assert got[b, m, h] == (max(cosine, key=cosine.get) == own[b, m])
    assert got[:2, 1].all()
    assert 0 < got.sum() < got.numel()
    torch.testing.assert_close(cosines(read[:, :4], values), cosine_similarity(read[:, :4], values, dim=-1))
    assert not nearest(torch.ones(1, 1, 1, 2), torch.tensor([[0]]), torch.ones(1, 2).bool()).any()  # a tie


def test_mean_absolute_cosine():
    k_BTHK = normalize(random(B, T, H, K), dim=-1)
    generator = torch.Generator().manual_seed(1)
    first, second = (torch.rand(B, T, generator=generator) < 0.5 for _ in range(2))
    for masks in ((first, second), (first, first)):
        total, count = torch.zeros(H, dtype=torch.float64), 0
        for b, s, t in np.ndindex(B, T, T):
            if s != t and masks[0][b, s] and masks[1][b, t]:
                total, count = total + (k_BTHK[b, s] * k_BTHK[b, t]).sum(-1).abs(), count + 1
        torch.testing.assert_close(mean_absolute_cosine(k_BTHK, *masks), total / count)
    alone = torch.zeros(B, T, dtype=torch.bool)
    alone[0, 3] = True
    assert mean_absolute_cosine(k_BTHK, alone, alone).isnan().all()


def test_random_cosine():
    assert random_cosine(2) == pytest.approx(2 / math.pi)
    assert random_cosine(64) == pytest.approx(0.1, abs=0.001)  # the notes' figure for 64 dimensions
    keys = normalize(random(2000, 2, 7), dim=-1)
    assert random_cosine(7) == pytest.approx(float((keys[:, 0] * keys[:, 1]).sum(-1).abs().mean()), abs=0.02)


def test_effective_rank_and_singular_values():
    state = torch.zeros(1, 3, 4, 6)
    state[0, 0, :3, :3] = 2 * torch.eye(3)
    state[0, 1, 0, 0], state[0, 1, 1, 1] = 3, 1
    values_BHR = singular_values(state)
    torch.testing.assert_close(values_BHR[0, 1], torch.tensor([3.0, 1, 0, 0]))
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    torch.testing.assert_close(rank_of(values_BHR)[0], torch.tensor([3.0, math.exp(entropy), 0.0]))
    state[0, 0, 0, 0] = torch.nan  # a state that is not finite leaves the others as they are
    assert singular_values(state)[0, 0].isnan().all()
    assert rank_of(singular_values(state))[0].tolist() == pytest.approx([math.nan, math.exp(entropy), 0.0], nan_ok=True)


def needles(keys: Tensor, beta: float = 1.0, log_decay: float = 0.0) -> Writes:
    """Writes of random values under some keys, as one row."""
    count = len(keys)
    gates = (torch.full((1, count, H), x, dtype=torch.float64) for x in (log_decay, beta))
    return Writes(keys.double()[None, :, None].expand(1, count, H, -1), random(1, count, H, V), *gates)


def test_two_writes():
    writes = needles(normalize(random(5, K), dim=-1), beta=0.7, log_decay=-0.2)
    measures = two_writes(writes)
    torch.testing.assert_close(measures["overwrite_left"], torch.full((H,), math.exp(-0.2) * 0.7 * 0.3).double())
    torch.testing.assert_close(measures["orthogonal_loss"], torch.full((H,), 1 - math.exp(-0.2)).double())
    k, v, changes = writes.k_BTHK[0, :, 0], writes.v_BTHV[0], []
    for i in range(4):  # one head at a time, each with the same keys
        first = 0.7 * v[i][:, None] * k[i][:, None]  # [H, K, V]
        second = math.exp(-0.2) * first
        error = v[i + 1] - torch.einsum("hkv,k->hv", second, k[i + 1])
        second = second + 0.7 * k[i + 1][:, None] * error[:, None]
        before, after = (torch.einsum("hkv,k->hv", state, k[i]) for state in (first, second))
        changes.append((after - before).norm(dim=-1) / before.norm(dim=-1))
    torch.testing.assert_close(measures["neighbour_loss"], torch.stack(changes).mean(0))
    perfect = two_writes(needles(torch.eye(K)))
    for name in perfect:
        assert perfect[name].abs().max() < 1e-9, name


def test_capacity_is_the_key_width_for_orthonormal_keys_and_one_for_equal_keys():
    basis = torch.eye(K).repeat(4, 1)
    curve = capacity_curve(needles(basis))
    assert {size: count for size, (_, count) in curve.items()} == dict.fromkeys((1, 2, 4, 8, 16, 32), 32)
    # The last K writes of each group are left
    assert [hits_H.tolist() for hits_H, _ in curve.values()] == [[n] * H for n in (32, 32, 32, 32, 16, 8)]
    assert capacity(curve).tolist() == [K] * H
    same = capacity_curve(needles(torch.eye(K)[:1].repeat(8, 1)))
    assert [hits_H.tolist() for hits_H, _ in same.values()] == [[n] * H for n in (8, 4, 2, 1)]
    assert capacity(same).tolist() == [1] * H
    assert capacity({1: (torch.tensor([3, 4]), 4), 2: (torch.tensor([4, 4]), 4)}).tolist() == [0, 2]


def observed(batch: TokenBatch) -> dict[str, Tensor]:
    """The sites of a mixer in a model without training."""
    module = GroundThink(40, 24, width=16, pattern="GS", window=5, seed=0).double()
    with torch.no_grad():
        _, seen = module.activations(batch["tokens"], [f"*.gated_delta.{site}" for site in SITES])
    return {name: seen[f"network.blocks.0.gated_delta.{name}"][0] for name in SITES}


def test_queries_match_the_keys_of_their_needles_at_the_lag_of_the_write():
    batch = rows(seq_len=24, task="multi_key")
    sites, queries = observed(batch), Queries.of(batch)
    q_BTHK, writes = normalize(sites["query"], dim=-1), Writes.of(sites, False)
    match_LH = query_match(writes, q_BTHK, queries)
    for lag in range(LAGS):
        cosine = [
            (q_BTHK[b, t] * writes.k_BTHK[b, min(s + lag, 23)]).sum(-1)
            for b, t, s in zip(queries.row_Q, queries.time_Q, queries.place_Q, strict=True)
        ]
        torch.testing.assert_close(match_LH[lag], torch.stack(cosine).mean(0))
    # The queries of head 1 become the keys two positions behind those of their needles
    sites["query"][queries.row_Q, queries.time_Q, 1] = 3 * sites["key"][queries.row_Q, queries.place_Q + 2, 1]
    measures = measure_state(batch, sites, False, range(20, 40))
    assert (measures.lag, measures.head) == (2, 1)
    assert measures.values["query_match"] == pytest.approx(1, abs=1e-5)
    assert measures.values["write_lag"] == 2
    written_BT = torch.zeros_like(batch["tokens"], dtype=torch.bool)
    written_BT[queries.row_Q, queries.place_Q + 2] = True
    apart_H = mean_absolute_cosine(writes.k_BTHK, written_BT, (batch["tokens"] == 0) & ~written_BT)
    assert measures.values["key_cosine_filler"] == pytest.approx(float(apart_H[1]))
    read_BTHV = writes.read(normalize(sites["query"], dim=-1))
    found = []
    for b, t, place in zip(queries.row_Q.tolist(), queries.time_Q.tolist(), queries.place_Q.tolist(), strict=True):
        written = [s for s in range(24) if 20 > batch["tokens"][b, s] > 0 and batch["labels"][b, s] == IGNORE]
        cosine = {s: float(cosine_similarity(read_BTHV[b, t, 1], sites["value"][b, s + 2, 1], dim=0)) for s in written}
        found.append(max(cosine, key=cosine.get) == place)
    assert measures.values["query_retrieval"] == pytest.approx(sum(found) / 9)
    assert measures.counts == {"self_retrieval": 9, "query_retrieval": 9}


def test_all_measures_of_a_mixer():
    batch = rows(seq_len=24)
    sites = observed(batch)
    queries = Queries.of(batch)
    sites["query"][queries.row_Q, queries.time_Q, 0] = sites["key"][queries.row_Q, queries.place_Q + 1, 0]
    measures = measure_state(batch, sites, False, range(20, 40))
    found, head = measures.values, measures.head
    assert (measures.lag, head) == (1, 0)  # the write is at the value: positions 1, 3 and 5
    key_BT = (batch["tokens"] < 20) & (batch["tokens"] > 0) & (batch["labels"] == IGNORE)
    assert found["beta_key"] == pytest.approx(float(sites["gates.beta"][key_BT][:, head].mean()))
    assert found["beta_write"] == found["beta_value"] != found["beta_key"]
    query_BT = batch["labels"] != IGNORE
    assert found["decay_query"] == pytest.approx(float(sites["gates.log_decay"][query_BT][:, head].exp().mean()))
    writes, end_B = Writes.of(sites, False), first_queries(batch["labels"])
    place_BN, v_BNHV = torch.arange(1, 6, 2).expand(B, -1), writes.v_BTHV[:, 1:6:2]
    cosine = cosine_similarity(read_back(writes, place_BN, end_B), v_BNHV, dim=-1)
    assert found["self_retrieval_cosine"] == pytest.approx(float(cosine[..., head].mean()))
    k_BNK = writes.k_BTHK[:, 1:6:2, head]
    off = torch.einsum("bnk,bmk->bnm", k_BNK, k_BNK).abs() * (1 - torch.eye(3))
    assert found["key_cosine_needles"] == pytest.approx(float(off.sum() / (B * 6)))
    spectrum_BHR = torch.linalg.svdvals(writes.state_before(end_B))
    assert found["effective_rank"] == pytest.approx(float(rank_of(spectrum_BHR)[:, head].mean()))
    assert found["top_singular_value"] == pytest.approx(float(spectrum_BHR[:, head, 0].mean()))
    assert [name for name in found if name.startswith("cosine_after_")] == [f"cosine_after_{r}" for r in (0, 1, 2)]
    last = cosine_similarity(read_later(writes, place_BN, 2), v_BNHV[:, :1], dim=-1)[..., head].mean()
    assert found["cosine_after_2"] == pytest.approx(float(last))
    pairs = batch["tokens"][:, :6].reshape(-1, 2).tolist()
    first = {key: value for key, value in reversed(pairs)}  # the first value of each key
    assert measures.capacity_curve[1][1] == len(set(first.values())) < len(pairs)


def test_gates_of_shifted_values():
    batch = rows(seq_len=24)
    sites, queries = observed(batch), Queries.of(batch)
    sites["query"][queries.row_Q, queries.time_Q, 0] = sites["key"][queries.row_Q, queries.place_Q, 0]
    found = measure_state(batch, sites, True, range(20, 40)).values
    assert (found["write_lag"], found["head"]) == (1, 0)  # the value, under the key before it
    beta_BT = sites["gates.beta"][..., 0]
    assert found["beta_key"] == found["beta_write"] == pytest.approx(float(beta_BT[:, 0:6:2].mean()))
    assert found["beta_value"] == pytest.approx(float(beta_BT[:, 1:6:2].mean()))


def test_rows_without_filler_and_with_fewer_needles_have_measures():
    batch = rows(seq_len=9)  # the first query stands right behind the last value
    sites, queries = observed(batch), Queries.of(batch)
    sites["query"][queries.row_Q, queries.time_Q, 1] = sites["key"][queries.row_Q, queries.place_Q + 2, 1]
    measures = measure_state(batch, sites, False, range(20, 40))
    assert (measures.lag, measures.head) == (2, 1)  # the last write, at 6, comes with the first query
    writes, place_BN = Writes.of(sites, False), torch.tensor([[2, 4, 6]] * B)
    read_BNHV = read_back(writes, place_BN, torch.full((B,), 7))
    cosine = cosine_similarity(read_BNHV, writes.at(place_BN).v_BTHV, dim=-1)[..., 1].mean()
    assert measures.values["self_retrieval_cosine"] == pytest.approx(float(cosine))
    batch["tokens"][0, 4:6], batch["labels"][0, 6:] = 0, IGNORE  # row 0 has two needles, and one query
    batch["labels"][0, 8] = batch["tokens"][0, 1]
    batch["tokens"][0, 8] = batch["tokens"][0, 0]
    measures = measure_state(batch, sites := observed(batch), False, range(20, 40))
    assert measures.counts == {"self_retrieval": 8, "query_retrieval": 7}
    writes, place_BN = Writes.of(sites, False), torch.tensor([[0, 2, 4]] * B) + measures.lag
    cosine_BMH = cosine_similarity(read_later(writes, place_BN, 1), writes.at(place_BN).v_BTHV[:, :2], dim=-1)
    pairs = cosine_BMH[..., measures.head].flatten()[[0, 2, 3, 4, 5]]  # row 0 has one pair
    assert measures.values["cosine_after_1"] == pytest.approx(float(pairs.mean()), abs=1e-6)
    assert all(math.isfinite(x) for name, x in measures.values.items() if "filler" not in name)
