"""StateTracking: products in the order of the tokens, by composing permutations one by one."""

from itertools import permutations

import numpy as np
import pytest
import torch

from datamodules import StateTracking
from datamodules.sequence_task import collate, stream


def elements(group):
    """Returns the elements as permutations; those of a cyclic group are rotations."""
    family, n = group[0], int(group[1:])
    if family == "Z":
        return [tuple((i + shift) % n for i in range(n)) for shift in range(n)]
    every = list(permutations(range(n)))
    return [p for p in every if family == "S" or round(np.linalg.det(np.eye(n)[list(p)])) == 1]


@pytest.mark.parametrize(("group", "order"), [("S3", 6), ("S4", 24), ("A5", 60), ("Z7", 7)])
def test_a_label_is_the_product_of_the_elements_so_far(group, order):
    data = StateTracking(group, train_len=13, test_len=50)
    every = elements(group)
    number = {element: i for i, element in enumerate(every)}
    assert len(number) == data.vocab_size == order
    assert data.chance == 1 / order
    for rows, length in (
        (data.draw(stream(0), 20), 13),
        (data.fixed("validation", 5), 13),
        (data.fixed("test", 5), 50),
    ):
        assert rows.shape[1:] == (2, length)
        for tokens, labels in rows.tolist():
            state = tuple(range(len(every[0])))
            for token, label in zip(tokens, labels, strict=True):
                state = tuple(every[token][i] for i in state)  # the product so far, then the new element
                assert number[state] == label
            assert data.input_labels(tokens) == labels
    assert data.seq_len == 50


def test_an_element_is_several_tokens_with_the_label_at_the_last():
    one, three = (StateTracking("S3", train_len=4, test_len=9, tokens_per_element=n) for n in (1, 3))
    assert (three.vocab_size, three.seq_len, three.chance) == (18, 27, 1 / 6)
    for expected, rows in (
        (one.draw(stream(0), 5), three.draw(stream(0), 5)),
        (one.fixed("test", 5), three.fixed("test", 5)),
    ):
        tokens, labels = rows[:, 0], rows[:, 1]
        for place in range(3):
            np.testing.assert_array_equal(tokens[:, place::3], expected[:, 0] + 6 * place)
        np.testing.assert_array_equal(labels[:, 2::3], expected[:, 1])
        assert (labels[:, [i for i in range(labels.shape[1]) if i % 3 != 2]] == -100).all()
    tokens = three.parse("5 1")
    assert tokens == [5, 11, 17, 1, 7, 13]
    assert three.input_labels(tokens) == [-100, -100, 5, -100, -100, one.input_labels([5, 1])[1]]
    with pytest.raises(ValueError, match="6"):
        three.parse("6")
    assert three.groups == one.groups
    assert three.group_of(collate(three.fixed("test", 2)))[1, ::3].tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4]
    assert three.group_of(collate(three.fixed("test", 2)))[1, 2::3].tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4]


def test_positions_are_grouped_by_octave():
    data = StateTracking("Z2", train_len=4, test_len=9)
    assert data.groups == [f"position_to_{edge}" for edge in (1, 2, 4, 8, 16)]
    assert data.group_of(collate(data.fixed("test", 2)))[1].tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4]
    assert data.group_of({"tokens": torch.zeros(2, 3, dtype=torch.int64)}).shape == (2, 3)


@pytest.mark.parametrize("group", ["S2", "S6", "A7", "Z1", "D4", "S", "", "Z" + 5000 * "1"])
def test_unknown_groups(group):
    with pytest.raises(ValueError, match=r"data.group '.*' must be S3, S4, S5, A3 to A6, or Z2 to Z1024"):
        StateTracking(group)


def test_an_element_has_a_token():
    with pytest.raises(ValueError, match=r"data\.tokens_per_element"):
        StateTracking("S3", tokens_per_element=0)
