"""What tasks of numbered tokens share: draws without replacement, pairs and queries, inputs, groups by size.

Shapes: B rows, T positions.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from datamodules.batch import IGNORE, Integers
from datamodules.errors import UserError

SPARSE = 4  # from this many numbers per draw, repetitions are so rare that drawing them again is the faster way


def distinct(rng: np.random.Generator, count: int, size: int, many: int) -> Integers:
    """Draw `many` different numbers below `size` in random order for each of `count` rows, [count, many]."""
    if size < SPARSE * many:
        return rng.random((count, size)).argsort(axis=1)[:, :many]
    number_BM = rng.integers(size, size=(count, many))
    while (again_BM := _repeated(number_BM)).any():
        number_BM[again_BM] = rng.integers(size, size=again_BM.sum())
    return number_BM


def _repeated(number_BM: Integers) -> np.ndarray[tuple[int, ...], np.dtype[np.bool_]]:
    """Return where a number stands that its row has already had."""
    order_BM = number_BM.argsort(axis=1, kind="stable")
    sorted_BM = np.take_along_axis(number_BM, order_BM, 1)
    repeated_BM = np.zeros(number_BM.shape, np.bool_)
    np.put_along_axis(repeated_BM, order_BM[:, 1:], sorted_BM[:, 1:] == sorted_BM[:, :-1], 1)
    return repeated_BM


def pair_rows(
    length: int,
    key_BW: Integers,
    value_BW: Integers,
    place_BW: Integers,
    query_BQ: Integers,
    answer_BQ: Integers,
    asked_BQ: Integers,
    filler_BT: Integers | None = None,
) -> Integers:
    """Return rows_B2T with pairs of a key and a value, and queries whose label is their answer.

    Args:
        length: T.
        key_BW: Keys.
        value_BW: Values; each stands behind its key.
        place_BW: Positions of the keys.
        query_BQ: Keys that are queried.
        answer_BQ: Labels of the queries.
        asked_BQ: Positions of the queries.
        filler_BT: The other tokens; None for 0.
    """
    rows_2BT = np.zeros((2, len(key_BW), length), np.int64)
    tokens_BT, labels_BT = rows_2BT
    labels_BT[:] = IGNORE
    if filler_BT is not None:
        tokens_BT[:] = filler_BT
    for place, token in ((place_BW, key_BW), (place_BW + 1, value_BW), (asked_BQ, query_BQ)):
        np.put_along_axis(tokens_BT, place, token, 1)
    np.put_along_axis(labels_BT, asked_BQ, answer_BQ, 1)
    return rows_2BT.swapaxes(0, 1)


def recalled(tokens: list[int], keys: range, values: range) -> list[int]:
    """Return the labels of a row: where a key returns without a value behind it, the value last written to the key."""
    written: dict[int, int] = {}
    labels = [IGNORE] * len(tokens)
    for place, token in enumerate(tokens):
        if token not in keys:
            continue
        if place + 1 < len(tokens) and tokens[place + 1] in values:
            written[token] = tokens[place + 1]
        else:
            labels[place] = written.get(token, IGNORE)
    return labels


def number_below(bound: int, word: str) -> int | None:
    """Return the number that a word is, or None if it is none from 0 to `bound` - 1."""
    digits = word.lstrip("0") or "0"
    short = word.isdecimal() and len(digits) <= len(str(bound))  # Python reads no number of thousands of digits
    return int(digits) if short and int(digits) < bound else None


def parse_numbers(text: str, vocab_size: int) -> list[int]:
    """Return the tokens of a text of numbers separated by spaces.

    Raises:
        UserError: The text has something else, or a number that is no token.
    """
    numbers = [number_below(vocab_size, word) for word in text.split()]
    tokens = [number for number in numbers if number is not None]
    if len(tokens) < len(numbers):
        raise UserError(f"'{text}' is not a row of numbers from 0 to {vocab_size - 1}")
    return tokens


def octaves(longest: int) -> list[int]:
    """Return 1, 2, 4, ... up to the first power of 2 that is at least `longest`."""
    return [2**power for power in range((longest - 1).bit_length() + 1)]


def octave_of(number_BT: Tensor, edges: Iterable[int]) -> Tensor:
    """Return the index of the first edge that is at least the number, int64 [B, T]."""
    return torch.bucketize(number_BT, torch.tensor([*edges], device=number_BT.device))


def write_distances(tokens_BT: Tensor, labels_BT: Tensor) -> Tensor:
    """Return how many positions ago the token of each query last stood without a label; 0 where there is no query."""
    order_BT = tokens_BT.argsort(dim=1, stable=True)  # equal tokens lie side by side, in the order of their positions
    written_BT = labels_BT.gather(1, order_BT) == IGNORE
    index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
    last_BT = torch.where(written_BT, index_T, 0).cummax(1).values
    distance_BT = torch.zeros_like(tokens_BT).scatter(1, order_BT, order_BT - order_BT.gather(1, last_BT))
    return distance_BT.where(labels_BT != IGNORE, 0)
