"""The probes of recall against loops over queries, and forwards without a state against mixers that lose it."""

import math
from functools import partial

import pytest
import torch

from datamodules import NeedleGym
from datamodules.batch import IGNORE, TokenBatch
from datamodules.sequence_task import collate
from lightning_modules.groundthink import GroundThink
from lightning_modules.groundthink.probes import recall, recall_report
from lightning_modules.groundthink.probes.needles import Queries, answers, first_queries, places, roles
from lightning_modules.groundthink.probes.silence import state_set


def rows(**options) -> TokenBatch:
    knobs = {"needles": 3, "seq_len": 20, "vocab_size": 40, "seed": 0} | options
    return collate(NeedleGym(**knobs).fixed("test", 3))


def test_roles_places_and_queries_of_a_row():
    tokens = torch.tensor([[4, 11, 2, 9, 7, 14, 0, 2, 0, 7, 4, 0], [0, 3, 9, 0, 0, 0, 0, 0, 0, 0, 0, 3]])
    labels = torch.full_like(tokens, IGNORE)
    labels[0, 7], labels[0, 9], labels[0, 10], labels[1, 11] = 9, 14, 11, 9
    batch: TokenBatch = {"tokens": tokens, "labels": labels}
    role = roles(batch, range(8, 16))
    assert role["key"].nonzero().tolist() == [[0, 0], [0, 2], [0, 4], [1, 1]]
    assert role["value"].nonzero().tolist() == [[0, 1], [0, 3], [0, 5], [1, 2]]
    assert role["query"].nonzero().tolist() == [[0, 7], [0, 9], [0, 10], [1, 11]]
    assert (sum(mask.int() for mask in role.values()) == 1).all()
    place_BN, present_BN = places(role["value"])
    assert place_BN[0].tolist() == [1, 3, 5]
    assert place_BN[1, 0] == 2
    assert present_BN.tolist() == [[True, True, True], [True, False, False]]
    assert first_queries(labels).tolist() == [7, 11]
    assert first_queries(torch.full((1, 4), IGNORE)).tolist() == [4]
    queries = Queries.of(batch)
    assert queries.place_Q.tolist() == [2, 4, 0, 1]
    assert queries.label_Q.tolist() == [9, 14, 11, 9]
    assert queries.depth(12, 4).tolist() == [0, 1, 0, 0]
    assert queries.within(4).tolist() == [True, True, False, False]  # values at 3, 5, 1 and 2
    assert not queries.within(3)[0]


@pytest.mark.parametrize("task", ["multi_value", "multi_key", "multi_query"])
def test_answers_are_all_values_of_the_key(task):
    batch = rows(task=task, repeats=2, needles=2)
    queries = Queries.of(batch)
    found = answers(batch, queries)
    assert found.shape[1] == (2 if task == "multi_value" else 1)
    for row, time, label, place, answer_R in zip(
        queries.row_Q, queries.time_Q, queries.label_Q, queries.place_Q, found, strict=True
    ):
        tokens = batch["tokens"][row].tolist()
        written = [
            tokens[s + 1] for s in range(time) if tokens[s] == tokens[time] and batch["labels"][row, s] == IGNORE
        ]
        assert answer_R.tolist() == written
        assert label == written[-1] == tokens[place + 1]


def test_hits_need_the_strictly_largest_logit():
    logits = torch.tensor([[[0.0, 2, 1], [2, 2, 1], [math.nan, 2, 1], [-1, -2, -3]]])
    assert recall.hits(logits, torch.tensor([1, 1, 1, 2])).tolist()[0][:2] == [1, 0]
    assert recall.hits(logits, torch.tensor([1, 1, 1, 0]))[0, 3] == 1
    assert recall.hits(logits, torch.tensor([1, 1, 1, 2]))[0, 2].isnan()


def test_found_are_the_answers_among_as_many_most_likely_tokens():
    logits = torch.tensor([[[5.0, 4, 3, 2], [5, 4, 3, 2], [5, 4, 3, 2], [math.nan, 4, 3, 2]]])
    found = recall.found(logits, torch.tensor([[1, 0], [0, 2], [3, 2], [0, 1]]))
    assert found[0, :3].tolist() == [2, 1, 0]
    assert found[0, 3].isnan()
    equal = torch.tensor([[[2.0, 2, 2, 1]]])
    assert [recall.found(equal, torch.tensor([[answer]])).item() for answer in range(4)] == [0, 0, 0, 0]
    assert recall.found(equal, torch.tensor([[0, 1, 2]])).item() == 3


def test_tally_by_depth_and_window():
    batch = rows(task="multi_key", seq_len=40)
    queries = Queries.of(batch)
    hit_SQ = torch.rand(2, len(queries.row_Q), generator=torch.Generator().manual_seed(0)).round().double()
    hits_SP2, count_P2 = recall.tally(hit_SQ, queries, 40, 5, 15)
    expected, counts = torch.zeros_like(hits_SP2), torch.zeros_like(count_P2)
    for q, (time, place) in enumerate(zip(queries.time_Q.tolist(), queries.place_Q.tolist(), strict=True)):
        cell = int(place / 40 * 5), int(place + 1 > time - 16)  # a window of 16 sees the value
        expected[:, cell[0], cell[1]] += hit_SQ[:, q]
        counts[cell] += 1
    assert torch.equal(hits_SP2, expected)
    assert torch.equal(count_P2, counts)
    assert (count_P2.sum(0) > 0).all()
    assert recall.tally(hit_SQ, queries, 40, 5, None)[1][:, 1].sum() == 0


def test_the_reach_of_windows_adds_up():
    sizes = {"vocab_size": 11, "seq_len": 20, "width": 16, "window": 5}
    assert recall.window_reach(GroundThink(**sizes, pattern="GSGS").network) == 8
    assert recall.window_reach(GroundThink(**sizes, pattern="GG").network) is None


def test_a_state_that_is_off_is_zero_at_every_position():
    module = GroundThink(40, 20, width=16, pattern="GSGS", window=5, seed=0, window_reads_state=True).double()
    batch, mixers = rows(), [module.network.blocks[i].gated_delta for i in (0, 2)]
    plain = module(batch["tokens"])
    zero = [mixer.state.register_forward_hook(lambda module, args, output: output * 0) for mixer in mixers]
    expected = module(batch["tokens"])
    for handle in zero:
        handle.remove()
    with state_set(module.network, "off", first_queries(batch["labels"])):
        torch.testing.assert_close(module(batch["tokens"]), expected, rtol=0, atol=1e-8)
    with state_set(module.network, "on", first_queries(batch["labels"])):
        assert torch.equal(module(batch["tokens"]), plain)
    assert torch.equal(module(batch["tokens"]), plain)  # the hooks are gone
    assert (plain - expected).abs().max() > 1e-2


@pytest.mark.parametrize("shifted", [False, True])
def test_a_cleared_state_is_empty_when_the_first_query_comes(shifted):
    module = GroundThink(40, 20, width=16, pattern="GSGS", window=5, seed=0, shifted_value=shifted).double()
    batch, mixers = rows(), [module.network.blocks[i].gated_delta for i in (0, 2)]
    first_B = first_queries(batch["labels"])
    with state_set(module.network, "cleared", first_B):
        got = module(batch["tokens"])
    assert (got - module(batch["tokens"])).abs().max() > 1e-2
    for b, first in enumerate(first_B.tolist()):

        def in_two_parts(x_BTD, mixer, first=first):
            before, state = mixer.extend(x_BTD[:, :first], mixer.init_state(1))
            state.memory_BHKV = torch.zeros_like(state.memory_BHKV)
            return torch.cat([before, mixer.extend(x_BTD[:, first:], state)[0]], 1)

        for mixer in mixers:
            mixer.forward = partial(in_two_parts, mixer=mixer)
        torch.testing.assert_close(module(batch["tokens"][b : b + 1])[0], got[b], rtol=0, atol=1e-8)


def test_the_table_and_the_heat_map_show_every_cell():
    cells = []
    for state, hits in (("on", [[3.0, 1], [2, 0]]), ("off", [[0.0, 0], [0, math.nan]])):
        for length in (64, 256):
            count = torch.tensor([[4, 2], [2, 0]])
            cells.append(recall_report.Cell("mqar", 8, length, state, torch.tensor(hits), count))
    rows = recall_report.lines(cells, windowed=True)
    assert len(rows) == 12  # no line for an empty cell
    first = rows[0].plain
    assert (first["depth"], first["window"], first["hits"], first["n"]) == ("0-50", "outside", 3, 4)
    assert first["accuracy"] == 0.75
    assert first["interval"] == pytest.approx([0.3006, 0.9544], abs=1e-4)
    table = recall_report.markdown(rows)
    assert "| mqar | 8 | 64 | 0-50 | outside | 4 | 75.0% [30.1%, 95.4%] | 0.0% [0.0%, 49.0%] |" in table
    texts = [text.get_text() for axes in recall_report.heat_map(cells).axes for text in axes.texts]
    assert texts.count("66.7%\nn = 6") == 2
    assert texts.count("100.0%\nn = 2") == 2
    gone = recall_report.Cell("mqar", 8, 64, "on", torch.full((1, 2), math.nan), torch.tensor([[4, 0]]))
    (line,) = recall_report.lines([gone], windowed=False)
    assert (line.plain["accuracy"], line.plain["interval"], line.plain["window"]) == (None, None, None)
    assert "diverged" in recall_report.markdown([line])
