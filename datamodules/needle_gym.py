"""Needles in filler: pairs of a key and a value, and queries of the keys.

Shapes: B rows, T positions, N needles (keys), W pairs that are written, Q queries.
"""

from typing import Any, Literal

import numpy as np
from torch import Tensor

from datamodules.batch import Integers, TokenBatch
from datamodules.errors import SIZE, UserError, check_numbers
from datamodules.token_rows import distinct, octave_of, octaves, pair_rows, parse_numbers, recalled, write_distances
from datamodules.tunable_task import TunableTask

Kind = Literal["mqar", "single", "multi_key", "multi_value", "multi_query", "slot_markers", "identical_markers"]


class NeedleGym(TunableTask):
    """A row has pairs of a key and a value, filler, and queries: keys that return, with the key's value as label.

    A row of `mqar` with `needles` 3, `seq_len` 12 and `vocab_size` 16; keys are tokens 1 to 7, values 8 to 15, filler
    is token 0, and `-` is IGNORE::

        tokens  4 11  2  9  7 14  0  2  0  7  4  0
        labels  -  -  -  -  -  -  -  9  - 14 11  -

    In `mqar` (Arora et al. 2024, arXiv:2312.04927) the pairs come first and the queries stand anywhere behind them. In
    all other tasks the pairs are hidden anywhere in filler and the queries are the last tokens of the row, in random
    order. Keys, values and places are drawn for each row.

    - `single`: one key, one value, one query; needs `needles` 1.
    - `multi_key`: N keys, each with one value.
    - `multi_value`: each of N keys is written `repeats` times with different values, in random order; the label is the
      value written last.
    - `multi_query`: each of N keys has one value and is queried `repeats` times.
    - `slot_markers`: the keys are the same N tokens in each row.
    - `identical_markers`: all N keys are the same token. The label of each query is the value of another needle, in
      random order, so a model that answers with one of the values is right once per row: `ceiling` is 1 / N.

    `multi_key`, `multi_value` and `multi_query` vary the axes of RULER (arXiv:2404.06654), but query every key.

    Args:
        needles: N.
        seq_len: T.
        distance: Fewest positions from a key's pair to its query; at least 2.
        task: How pairs and queries are made.
        queries: Keys per row that are queried, drawn at random; None for all.
        repeats: Pairs per key in `multi_value`, queries per key in `multi_query`.
        value_count: Values that rows have, the first ones; None for all. With 1, the answer is always the same token,
            and a model can learn it without reading the row.
        filler_tokens: Tokens of filler, which are the first ones; each filler position has one of them at random.
        vocab_size: Tokens in total. Those that are not filler are keys in the first half, and values in the second.
        **common: Arguments of `SequenceTask`.

    Attributes:
        groups: Names of the groups of queries by distance: `distance_to_16` has the distances 9 to 16.
    """

    def __init__(
        self,
        needles: int = 8,
        seq_len: int = 64,
        distance: int = 2,
        task: Kind = "mqar",
        queries: int | None = None,
        repeats: int = 4,
        value_count: int | None = None,
        filler_tokens: int = 1,
        vocab_size: int = 256,
        **common: Any,
    ):
        super().__init__(**common)
        check_numbers("data", 4, SIZE, vocab_size=vocab_size)
        check_numbers("data", 1, vocab_size - 2, filler_tokens=filler_tokens)
        self.vocab_size, self.filler_tokens = vocab_size, filler_tokens
        middle = (filler_tokens + vocab_size) // 2
        self.keys, self.values = range(filler_tokens, middle), range(middle, vocab_size)
        self.tune(needles, seq_len, distance, task, queries, repeats, value_count)

    def tune(
        self,
        needles: int,
        seq_len: int,
        distance: int,
        task: Kind,
        queries: int | None,
        repeats: int,
        value_count: int | None,
    ) -> None:
        """Set the knobs; see the class.

        Raises:
            UserError: The row is too short, or there are not enough keys or values.
        """
        check_numbers("data", 1, SIZE, needles=needles, seq_len=seq_len, repeats=repeats)
        check_numbers("data", 2, SIZE, distance=distance)
        check_numbers("data", 1, needles, queries=queries)
        check_numbers("data", 1, len(self.values), value_count=value_count)
        if task == "single" and needles != 1:
            raise UserError("data.task 'single' has one needle: set data.needles to 1, or data.task to 'multi_key'")
        self.needles, self.seq_len, self.distance, self.task = needles, seq_len, distance, task
        self.queries, self.repeats, self.value_count = queries, repeats, value_count
        self._values = len(self.values) if value_count is None else value_count
        self.chance = 1 / self._values
        self._keys_queried = needles if queries is None else queries
        self._asked = self._keys_queried * (repeats if task == "multi_query" else 1)
        self._written = needles * (repeats if task == "multi_value" else 1)
        self._check_room()
        self.ceiling = 1 / needles if task == "identical_markers" else 1.0
        self._edges = octaves(seq_len)
        self.groups = [f"distance_to_{edge}" for edge in self._edges]

    def _check_room(self) -> None:
        if (least := 2 * self._written + self.distance - 2 + self._asked) > self.seq_len:
            raise UserError(
                f"data.seq_len {self.seq_len} is too short: {self._written} pairs, a distance of {self.distance} and "
                f"{self._asked} queries need {least}"
            )
        keys = 1 if self.task == "identical_markers" else self.needles
        if keys <= len(self.keys) and self._values < self._written <= len(self.values):
            raise UserError(f"data.value_count {self._values} is too small: a row has {self._written} different values")
        if keys > len(self.keys) or self._written > len(self.values):
            least = self.filler_tokens + 2 * max(keys, self._written)
            raise UserError(
                f"data.vocab_size {self.vocab_size} has {len(self.keys)} keys and {len(self.values)} values, too few "
                f"for a row: {least} tokens are enough"
            )

    def randomness(self, rng: np.random.Generator, count: int) -> tuple[Integers, ...]:
        """Draw keys, values and places of the pairs; keys, answers and places of the queries; filler."""
        needles, written, asked = self.needles, self._written, self._asked
        match self.task:
            case "identical_markers":
                key_BN = np.zeros((count, needles), int)
            case "slot_markers":
                key_BN = np.tile(np.arange(needles), (count, 1))
            case _:
                key_BN = distinct(rng, count, len(self.keys), needles)
        key_BN = key_BN + self.keys.start
        value_BW = distinct(rng, count, self._values, written) + self.values.start
        order_BW = distinct(rng, count, written, written)  # equal modulo N: pairs of one key
        last_BN = order_BW.argsort(axis=1).reshape(count, -1, needles).max(axis=1)
        queried_BN = distinct(rng, count, needles, self._keys_queried)
        repeat_BQ = distinct(rng, count, asked, asked) % self._keys_queried
        which_BQ = np.take_along_axis(queried_BN, repeat_BQ, 1)
        key_BW = np.take_along_axis(key_BN, order_BW % needles, 1)
        query_BQ = np.take_along_axis(key_BN, which_BQ, 1)
        answer_BQ = np.take_along_axis(value_BW, np.take_along_axis(last_BN, which_BQ, 1), 1)
        drawn = key_BW, value_BW, self._pair_places(rng, count), query_BQ, answer_BQ, self._query_places(rng, count)
        if self.filler_tokens == 1:
            return drawn
        return *drawn, rng.integers(self.filler_tokens, size=(count, self.seq_len))

    def _pair_places(self, rng: np.random.Generator, count: int) -> Integers:
        written = self._written
        if self.task == "mqar":
            return np.tile(np.arange(0, 2 * written, 2), (count, 1))
        room = self.seq_len - self._asked - (self.distance - 2)
        # Places of the pairs among filler, with each pair as one place
        places: Integers = np.sort(distinct(rng, count, room - written, written), axis=1) + np.arange(written)
        return places

    def _query_places(self, rng: np.random.Generator, count: int) -> Integers:
        if self.task != "mqar":
            return np.tile(np.arange(self.seq_len - self._asked, self.seq_len), (count, 1))
        first = 2 * self._written + self.distance - 2
        return first + distinct(rng, count, self.seq_len - first, self._asked)

    def rows(self, *drawn: Integers) -> Integers:
        """Write pairs and queries into filler, rows_B2T."""
        return pair_rows(self.seq_len, *drawn)

    def parse(self, text: str) -> list[int]:
        """Return the tokens of a text of numbers separated by spaces."""
        return parse_numbers(text, self.vocab_size)

    def input_labels(self, tokens: list[int]) -> list[int]:
        """Return the value last written to each key that stands there without a value behind it."""
        return recalled(tokens, self.keys, self.values)

    def group_of(self, batch: TokenBatch) -> Tensor:
        """Return the index in `groups` of each query, int64 [B, T]; the index means nothing where there is no label."""
        return octave_of(write_distances(batch["tokens"], batch["labels"]), self._edges)
