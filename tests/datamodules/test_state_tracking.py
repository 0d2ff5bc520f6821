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


def test_positions_are_grouped_by_octave():
    data = StateTracking("Z2", train_len=4, test_len=9)
    assert data.groups == [f"position_to_{edge}" for edge in (1, 2, 4, 8, 16)]
    assert data.group_of(collate(data.fixed("test", 2)))[1].tolist() == [0, 1, 2, 2, 3, 3, 3, 3, 4]
    assert data.group_of({"tokens": torch.zeros(2, 3, dtype=torch.int64)}).shape == (2, 3)


@pytest.mark.parametrize("group", ["S2", "S6", "A7", "Z1", "D4", "S", "", "Z" + 5000 * "1"])
def test_unknown_groups(group):
    with pytest.raises(ValueError, match=r"data.group '.*' must be S3, S4, S5, A3 to A6, or Z2 to Z1024"):
        StateTracking(group)
