"""Interleaved streams: one row of tokens holds several sequences, each of which follows a rule.

Shapes: B rows, N streams, J tokens of a stream, V tokens of a stream's vocabulary, T positions, U = T + 1.
"""

from itertools import pairwise
from typing import Any, Literal

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from datamodules.batch import IGNORE, HasWidth, Integers
from datamodules.errors import SEEDS, SIZE, UserError, check_numbers
from datamodules.modular_arithmetic import is_prime
from datamodules.sequence_task import TASK, SequenceTask, held_out_stream, label_next, stream
from datamodules.token_rows import parse_numbers

PERIODS = (2, 7)  # shortest and longest motif of `repeat`
BLOCK = 512  # rows per block; intermediate arrays of a block fit in the cache, which halves the time
KNOWN_AFTER = {"permutation": 1, "repeat": PERIODS[0] + 1, "affine": 3, "iid": 0}  # fewest tokens before a label


class InterleavedStreams(SequenceTask):
    """Streams A, B, ... are interleaved as A1 B1 A2 B2 ...; each label is the next token, if it is predictable.

    The `rule` determines how each stream continues:

    - `permutation`: x_{t+1} = pi(x_t), with one random permutation per stream, the same in all rows, splits and seeds.
      Labels begin after one token of the stream.
    - `repeat`: a motif of 2 to 7 different tokens, drawn per row and stream, is repeated. Labels begin once the first
      token of the motif has returned.
    - `affine`: x_{t+1} = a x_t + b mod p, with a in 1..p-1 and b drawn per row and stream, and p the largest prime up
      to V. Labels begin after three tokens, which determine the sequence (two equal tokens are a fixed point).
    - `iid`: random tokens, the negative control. Every position has a label and none is predictable.

    Two streams under `permutation` with `vocab_size` 10 and separate vocabularies, A of tokens 0 to 4 and B of tokens 5
    to 9; `-` is IGNORE::

        stream  A  B  A  B  A  B  A  B
        tokens  4  8  3  6  2  7  4  9
        labels  -  3  6  2  7  4  9  3

    With `interleave: random` no token tells which stream comes next. If k streams have a predictable next token at a
    labelled position, each of them comes next with probability 1 / k, so `ceiling` is the mean of 1 / k over the
    labelled positions of the test set.

    Args:
        n_streams: N.
        rule: How each stream continues.
        vocab_size: Tokens in total.
        seq_len: T, the tokens of a row over all streams.
        shared_vocab: All streams use all tokens; if false, each stream has `vocab_size // n_streams` separate tokens.
        interleave: `round_robin` alternates between the streams; `random` draws the stream of each position, and needs
            separate vocabularies.
        task_seed: Seed of the permutations, independent of `seed`.
        **common: Arguments of `SequenceTask`.
    """

    predicts_next = True

    def __init__(
        self,
        n_streams: int = 2,
        rule: Literal["permutation", "repeat", "affine", "iid"] = "permutation",
        vocab_size: int = 4096,
        seq_len: int = 128,
        shared_vocab: bool = True,
        interleave: Literal["round_robin", "random"] = "round_robin",
        task_seed: int = 0,
        **common: Any,
    ):
        super().__init__(**common)
        check_numbers("data", 1, SIZE, n_streams=n_streams, vocab_size=vocab_size, seq_len=seq_len)
        check_numbers("data", 0, SEEDS, task_seed=task_seed)
        if interleave == "random" and shared_vocab and n_streams > 1:
            raise UserError(
                "data.interleave 'random' needs data.shared_vocab false: a shared token does not tell its stream"
            )
        share = vocab_size if shared_vocab else vocab_size // n_streams
        if share < (least := PERIODS[1] if rule == "repeat" else 2):
            raise UserError(f"data.vocab_size {vocab_size} gives a stream {share} tokens, and '{rule}' needs {least}")
        if seq_len < (least := max(n_streams * KNOWN_AFTER[rule], 1)):
            raise UserError(f"data.seq_len {seq_len} is too short: '{rule}' with {n_streams} streams needs {least}")
        self.n_streams, self.rule, self.vocab_size, self.seq_len = n_streams, rule, vocab_size, seq_len
        self.interleave = interleave
        self.size = next(n for n in range(share, 1, -1) if is_prime(n)) if rule == "affine" else share
        self.offsets_N = np.zeros(n_streams, int) if shared_vocab else np.arange(n_streams) * share
        self.chance = 1 / (self.size if shared_vocab else self.size * n_streams)
        longest = seq_len + 1 if interleave == "random" else -(-(seq_len + 1) // n_streams)  # bound on J
        if rule == "permutation":
            self._line, self._where_NV = _unroll(stream(task_seed, TASK), n_streams, self.size, longest)
        if interleave == "round_robin":
            self.ceiling = 1 / self.size if rule == "iid" else 1.0
        else:
            self.ceiling = self.chance if rule == "iid" else self._random_ceiling()

    def setup(self, stage: str) -> None:
        """Make the held-out rows, and report once whether the streams compete for the module's width."""
        first = not self._held_out
        super().setup(stage)
        if not first or not isinstance(self._module, HasWidth):
            return
        tokens, length = self.vocab_size / self._module.width, self.seq_len / self._module.width
        rank_zero_info(f"InterleavedStreams: n/d (tokens over width) is {tokens:.3g}, L/d (positions) {length:.3g}")
        if tokens < 10:
            rank_zero_warn(f"no superposition: n/d, data.vocab_size over the model's width, is {tokens:.3g}, below 10")
        if length < 1.5:
            rank_zero_warn(f"no crowding: L/d, data.seq_len over the model's width, is {length:.3g}, below 1.5")

    def randomness(self, rng: np.random.Generator, count: int) -> tuple[Integers, ...]:
        """Draw first tokens, the rule's parameters per row, and the stream of each position if that is random."""
        shape = count, self.n_streams
        drawn: tuple[Integers, ...]
        match self.rule:
            case "permutation":
                drawn = (rng.integers(self.size, size=shape),)
            case "repeat":
                least, most = PERIODS
                choices_BNP = rng.integers(self.size - np.arange(most), size=(*shape, most))
                drawn = rng.integers(least, most + 1, size=shape), choices_BNP
            case "affine":
                drawn = tuple(rng.integers(low, self.size, size=shape) for low in (0, 1, 0))
            case "iid":
                drawn = (rng.integers(self.size, size=(count, self.seq_len + 1)),)
        if self.interleave == "random":
            return *drawn, rng.integers(self.n_streams, size=(count, self.seq_len + 1), dtype=np.int16)
        return drawn

    def rows(self, *drawn: Integers) -> Integers:
        """Generate the streams and interleave them into rows_B2T."""
        rows_2BT = np.empty((2, len(drawn[0]), self.seq_len), np.int64)
        for start in range(0, len(drawn[0]), BLOCK):
            block = slice(start, start + BLOCK)
            rows_2BT[:, block] = self._block(*(part[block] for part in drawn)).swapaxes(0, 1)
        return rows_2BT.swapaxes(0, 1)

    def _block(self, *drawn: Integers) -> Integers:
        count, length = len(drawn[0]), self.seq_len + 1
        if self.interleave == "random":
            law, owner_BU = drawn[:-1], drawn[-1]
            place_BU = self._places_of(owner_BU)
        else:
            law = drawn
            place_BU, owner_BU = np.divmod(np.arange(length)[None], self.n_streams)
        if self.rule == "iid":
            return label_next(law[0] + self._of_owner(self.offsets_N[None], owner_BU))
        stream_JBN = self._run(law, int(place_BU.max()) + 1)
        if self.interleave == "random":
            which_BU = np.multiply(place_BU, count * self.n_streams, dtype=int)
            which_BU += np.arange(0, count * self.n_streams, self.n_streams)[:, None]
            which_BU += owner_BU
            token_BU = stream_JBN.reshape(-1).take(which_BU)
        else:
            token_BU = stream_JBN.swapaxes(0, 1).reshape(count, -1)[:, :length]
        token_BU += self._of_owner(self.offsets_N[None], owner_BU)
        known_BU = place_BU >= self._of_owner(self._known_after(law), owner_BU)
        return label_next(token_BU, known_BU[:, 1:])

    def parse(self, text: str) -> list[int]:
        """Return the tokens of a text of numbers separated by spaces."""
        return parse_numbers(text, self.vocab_size)

    def _run(self, law: tuple[Integers, ...], length: int) -> Integers:
        """Return the first `length` tokens of each stream, stream_JBN, without the vocabulary offsets."""
        place_J11 = np.arange(length)[:, None, None]
        match self.rule:
            case "permutation":
                return self._line.take(self._where_NV[np.arange(self.n_streams), law[0]] + place_J11)
            case "repeat":
                period_BN, choices_BNP = law
                motif_BNP = _distinct(choices_BNP)
                within_JP = place_J11[:, 0] % np.arange(1, PERIODS[1] + 1)
                start_BN = np.arange(0, motif_BNP.size, PERIODS[1]).reshape(period_BN.shape)
                return motif_BNP.reshape(-1).take(start_BN + within_JP.take(period_BN - 1, axis=1))
        token_BN, a_BN, b_BN = law
        stream_JBN = np.empty((length, *token_BN.shape), int)
        stream_JBN[0] = token_BN
        for before_BN, after_BN in pairwise(stream_JBN):
            np.multiply(a_BN, before_BN, out=after_BN)
            after_BN += b_BN
            after_BN -= after_BN // self.size * self.size  # several times faster than %
        return stream_JBN

    def _known_after(self, law: tuple[Integers, ...]) -> Integers:
        """Return the number of tokens of a stream before its first label, [B, N], or [1, 1] if all are equal."""
        if self.rule == "repeat":
            return law[0] + 1  # until the first token of the motif returns, a new token could follow
        return np.full((1, 1), KNOWN_AFTER[self.rule])

    def _of_owner(self, value_BN: Integers, owner_BU: Integers) -> Integers:
        """Return the value of each token's stream."""
        if value_BN.size == 1:
            return value_BN
        if len(owner_BU) == 1:
            owner_U: Integers = owner_BU[0]
            return value_BN.take(owner_U, axis=1)
        starts_B = np.arange(0, value_BN.size, self.n_streams) if len(value_BN) > 1 else np.zeros(1, int)
        value_BU: Integers = value_BN.reshape(-1).take(owner_BU + starts_B[:, None])
        return value_BU

    def _places_of(self, owner_BU: Integers) -> Integers:
        """Return the number of earlier tokens of the same stream, for each token."""
        place_BU = np.zeros(owner_BU.shape, np.int32)
        for n in range(self.n_streams):
            mine_BU = owner_BU == n
            place_BU += (mine_BU.cumsum(1, dtype=np.int32) - 1) * mine_BU
        return place_BU

    def _random_ceiling(self) -> float:
        drawn = self.randomness(held_out_stream("test"), self.test_size)
        law, owner_BU = drawn[:-1], drawn[-1]
        known_after_BN = np.broadcast_to(self._known_after(law), (len(owner_BU), self.n_streams))
        candidates_BT = np.zeros((len(owner_BU), self.seq_len), int)
        for n in range(self.n_streams):
            candidates_BT += (owner_BU[:, :-1] == n).cumsum(1) >= known_after_BN[:, n, None]
        labelled_BT = self.rows(*drawn)[:, 1] != IGNORE
        return float((1 / candidates_BT[labelled_BT]).mean())


def _unroll(rng: np.random.Generator, n_streams: int, size: int, reach: int) -> tuple[Integers, Integers]:
    """Draw permutations and write their cycles into one array: pi_n^k(x) is line[where_NV[n, x] + k], for k < reach."""
    line: list[int] = []
    where_NV = np.empty((n_streams, size), int)
    for where_V in where_NV:
        after, unseen = rng.permutation(size).tolist(), set(range(size))
        for first in range(size):
            token, cycle = first, list[int]()
            while token in unseen:
                unseen.remove(token)
                cycle.append(token)
                token = after[token]
            where_V[cycle] = len(line) + np.arange(len(cycle))
            line += np.resize(cycle, len(cycle) + reach).tolist() if cycle else []
    return np.array(line), where_NV


def _distinct(choices_BNP: Integers) -> Integers:
    """Turn choices into draws without replacement: choice i, below size - i, indexes the numbers not yet chosen."""
    chosen_BNP = np.empty_like(choices_BNP)
    for i in range(choices_BNP.shape[2]):
        number_BN = choices_BNP[..., i].copy()
        for taken_BN in np.moveaxis(np.sort(chosen_BNP[..., :i], axis=2), 2, 0):
            number_BN += number_BN >= taken_BN
        chosen_BNP[..., i] = number_BN
    return chosen_BNP
