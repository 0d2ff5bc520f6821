"""NeedleGym: each query's label is the value last written to its key, found by reading the row from left to right."""

from collections import Counter
from itertools import permutations

import numpy as np
import pytest
import torch

from datamodules import NeedleGym
from datamodules.batch import IGNORE
from datamodules.sequence_task import collate, stream
from datamodules.token_rows import distinct

KEYS, VALUES = range(3, 26), range(26, 50)
CASES = {
    "mqar": {},
    "one of five queried": {"queries": 1},
    "single": {"task": "single", "needles": 1},
    "multi_key": {"task": "multi_key", "distance": 9},
    "multi_value": {"task": "multi_value", "repeats": 3},
    "multi_query": {"task": "multi_query", "repeats": 2, "queries": 3},
    "slot_markers": {"task": "slot_markers"},
}


def make(**options):
    return NeedleGym(**{"needles": 5, "seq_len": 40, "distance": 6, "filler_tokens": 3, "vocab_size": 50} | options)


def read(tokens, labels, filler=range(3)):
    """Returns the pairs, and (key, label, label by the row, distance to the pair) of each query."""
    pairs, queries, written, place = [], [], {}, 0
    while place < len(tokens):
        token = tokens[place]
        if labels[place] != IGNORE:
            value, wrote = written[token]
            queries.append((token, labels[place], value, place - wrote))
        elif token in KEYS:
            place += 1
            assert tokens[place] in VALUES
            assert labels[place] == IGNORE
            pairs.append((token, tokens[place]))
            written[token] = tokens[place], place - 1
        else:
            assert token in filler
        place += 1
    return pairs, queries


@pytest.mark.parametrize("name", CASES)
def test_a_label_is_the_value_last_written_to_the_key(name):
    data = make(**CASES[name])
    task, needles = data.task, data.needles
    tokens, labels = data.draw(stream(1), 500).swapaxes(0, 1).tolist()
    distances, places = set(), set()
    for row, label_T in zip(tokens, labels, strict=True):
        pairs, queries = read(row, label_T)
        writes = Counter(key for key, _ in pairs)
        assert len(writes) == needles
        assert set(writes.values()) == {3 if task == "multi_value" else 1}
        assert len({value for _, value in pairs}) == len(pairs)
        asked = Counter(key for key, *_ in queries)
        assert len(asked) == (data.queries or needles)
        assert set(asked.values()) == {2 if task == "multi_query" else 1}
        assert all(label == value for _, label, value, _ in queries)
        assert task != "slot_markers" or set(writes) == set(KEYS[:needles])
        assert data.input_labels(row) == label_T
        distances |= {distance for *_, distance in queries}
        places |= {place for place, label in enumerate(label_T) if label != IGNORE}
    assert min(distances) == data.distance
    assert len(distances) > 15
    assert (len(places) > 20) == (task == "mqar")  # elsewhere the queries are the last tokens
    assert max(places) == 39
    assert data.ceiling == 1
    assert data.chance == 1 / len(VALUES)
    assert NeedleGym(needles=2, value_count=4).chance == 1 / 4


def test_identical_markers_have_one_key_and_each_value_once():
    data = make(task="identical_markers")
    tokens, labels = data.draw(stream(1), 200).swapaxes(0, 1).tolist()
    hits = []
    for row, label_T in zip(tokens, labels, strict=True):
        pairs, queries = read(row, label_T)
        assert {key for key, _ in pairs} == {KEYS[0]} == {key for key, *_ in queries}
        assert {value for _, value in pairs} == {label for _, label, *_ in queries}
        hits += [label == last for _, label, last, _ in queries]
    assert np.mean(hits) == data.ceiling == 1 / 5  # always the last value
    assert 0 < np.mean(hits[-1::-5]) < 0.5  # the order is random
    assert make(task="identical_markers", queries=2).ceiling == 1 / 5


def test_rows_have_the_first_values_alone():
    few = make(task="slot_markers", needles=1, value_count=4)
    values = few.draw(stream(1), 200)[:, 1]
    assert set(values[values != IGNORE].tolist()) == set(range(26, 30))
    data = make(task="slot_markers", needles=1)
    data.plan([{"value_count": 1}])  # a fixed needle in training and validation; the test has all values
    phase, test = data.current.draw(stream(1), 50)[:, 1], data.fixed("test", 500)[:, 1]
    assert set(phase[phase != IGNORE].tolist()) == {26}
    assert set(test[test != IGNORE].tolist()) == set(VALUES)


def test_queries_are_grouped_by_distance():
    data = make(task="multi_value", repeats=2)
    batch = collate(data.draw(stream(2), 30))
    groups = data.group_of(batch)
    for row, label_T, group_T in zip(batch["tokens"].tolist(), batch["labels"].tolist(), groups, strict=True):
        distances = [distance for *_, distance in read(row, label_T)[1]]
        names = [data.groups[group] for group in group_T[torch.tensor(label_T) != IGNORE]]
        bounds = [int(name.removeprefix("distance_to_")) for name in names]
        assert all(bound / 2 < distance <= bound for distance, bound in zip(distances, bounds, strict=True))


@pytest.mark.parametrize(("size", "many"), [(4, 3), (9, 2)])
def test_draws_without_replacement_are_uniform(size, many):
    count = Counter(map(tuple, distinct(np.random.default_rng(0), 30_000, size, many).tolist()))
    every = list(permutations(range(size), many))
    assert set(count) == set(every)
    expected = 30_000 / len(every)
    assert sum((count[one] - expected) ** 2 / expected for one in every) < len(every) + 4 * (2 * len(every)) ** 0.5


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"needles": 13}, "data.seq_len 40 is too short: 13 pairs, a distance of 6 and 13 queries need 43"),
        ({"task": "multi_value", "repeats": 4}, "20 pairs, a distance of 6 and 5 queries need 49"),
        ({"vocab_size": 10}, "data.vocab_size 10 has 3 keys and 4 values, too few for a row: 13 tokens are enough"),
        ({"task": "single"}, "data.task 'single' has one needle: set data.needles to 1"),
        ({"queries": 6}, "data.queries must be at most 5"),
        ({"value_count": 4}, "data.value_count 4 is too small: a row has 5 different values"),
        ({"value_count": 25}, "data.value_count must be at most 24"),
        ({"distance": 1}, "data.distance must be at least 2"),
        ({"filler_tokens": 49}, "data.filler_tokens must be at most 48"),
    ],
)
def test_user_errors(options, reason):
    with pytest.raises(ValueError, match=reason):
        make(**options)
