"""InterleavedStreams: an independent oracle reaches the reported ceiling and does not exceed it."""

from collections import defaultdict
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest

from datamodules import InterleavedStreams
from datamodules.batch import IGNORE
from datamodules.sequence_task import stream

N = 3
SIZES = {"validation_size": 8, "test_size": 200, "epoch_size": 64, "seed": 1, "n_streams": N}


def rows_of(data, count=400):
    return data.draw(stream(9), count).swapaxes(0, 1)  # tokens and labels


def make(rule, interleave, shared_vocab, **options):
    sizes = {"vocab_size": 3 * 17, "seq_len": 48} | SIZES
    return InterleavedStreams(rule=rule, interleave=interleave, shared_vocab=shared_vocab, **sizes | options)


class Oracle:
    """Predicts the next token from the tokens so far; it knows `permutation` from the successors in training rows."""

    def __init__(self, data, rule, interleave, shared_vocab):
        self.rule, self.interleave = rule, interleave
        self.share = data.vocab_size if shared_vocab else data.vocab_size // N
        self.prime = {51: 47, 17: 17}[self.share]
        self.successors = defaultdict(dict)
        for row in rows_of(data)[0].tolist() if rule == "permutation" else ():
            for n, tokens in self.split(row).items():
                for one, after in pairwise(tokens):
                    assert self.successors[n].setdefault(one, after) == after

    def split(self, row):
        """Returns the tokens of each stream, by position or by vocabulary."""
        streams = defaultdict(list)
        for place, token in enumerate(row):
            streams[place % N if self.interleave == "round_robin" else token // self.share].append(token)
        return streams

    def after(self, n, tokens):
        """Returns the stream's next token, or None if it is unknown."""
        match self.rule:
            case "permutation":
                return self.successors[n].get(tokens[-1]) if tokens else None
            case "repeat":
                if len(set(tokens)) == len(tokens):
                    return None
                return tokens[len(tokens) - len(set(tokens))]
            case "affine" if len(tokens) >= 3:
                base = tokens[0] // self.share * self.share if self.share == 17 else 0
                x, y, z = (token - base for token in tokens[:3])
                a = 1 if x == y else (z - y) * pow(y - x, -1, self.prime) % self.prime
                return base + (a * (tokens[-1] - base) + y - a * x) % self.prime
            case "affine":
                return None
            case "iid":
                return 0

    def guesses(self, row, t):
        """Returns the possible next tokens, which are equally likely."""
        streams = self.split(row[: t + 1])
        turn = [(t + 1) % N] if self.interleave == "round_robin" else range(N)
        return [guess for n in turn if (guess := self.after(n, streams[n])) is not None]


@pytest.mark.parametrize("rule", ["permutation", "repeat", "affine"])
@pytest.mark.parametrize(
    ("interleave", "shared_vocab"), [("round_robin", True), ("round_robin", False), ("random", False)]
)
def test_an_oracle_reaches_the_ceiling(rule, interleave, shared_vocab):
    data = make(rule, interleave, shared_vocab)
    oracle = Oracle(data, rule, interleave, shared_vocab)
    tokens, labels = data.fixed("test", 200).swapaxes(0, 1)
    pick, hits, options = np.random.default_rng(0), [], []
    for row, label_T in zip(tokens.tolist(), labels, strict=True):
        for t, label in enumerate(label_T):
            guesses = oracle.guesses(row, t)
            if label == IGNORE:
                assert interleave == "random" or not guesses  # round robin: every predictable token has a label
            else:
                assert label in guesses
                hits.append(guesses[pick.integers(len(guesses))] == label)
                options.append(len(guesses))
    assert len(hits) > 2000
    assert data.ceiling == pytest.approx(np.mean([1 / k for k in options]), abs=1e-12)
    if interleave == "round_robin":
        assert all(hits)
        assert data.ceiling == 1.0
    else:
        assert 0.3 < data.ceiling < 0.6
        sigma = np.sqrt(data.ceiling * (1 - data.ceiling) / len(hits))
        assert abs(np.mean(hits) - data.ceiling) < 3 * sigma


@pytest.mark.parametrize(
    ("interleave", "shared_vocab", "ceiling"),
    [("round_robin", True, 1 / 51), ("round_robin", False, 1 / 17), ("random", False, 1 / 51)],
)
def test_nothing_tells_the_next_of_random_tokens(interleave, shared_vocab, ceiling):
    data = make("iid", interleave, shared_vocab)
    assert data.ceiling == pytest.approx(ceiling)
    assert data.chance == pytest.approx(1 / 51)
    count = np.zeros((2 * N, 51, 51))  # of each next token after each last token of the same stream, by turn
    for part, many in ((0, 2000), (1, 400)):
        tokens, labels = data.draw(stream(part), many).swapaxes(0, 1)
        assert (labels != IGNORE).all()
        turn = np.arange(tokens.shape[1]) % N if interleave == "round_robin" else np.zeros(tokens.shape[1], int)
        if part == 0:
            np.add.at(count, (turn, tokens, labels), 1)
    hits = count[turn, tokens].argmax(-1) == labels
    assert abs(hits.mean() - ceiling) < 3 * np.sqrt(ceiling * (1 - ceiling) / hits.size)


def test_tokens_of_each_rule():
    shares = np.arange(48) % N
    for rule in ("permutation", "repeat", "affine", "iid"):
        tokens, labels = rows_of(make(rule, "round_robin", False))
        assert (tokens // 17 == shares).all()
        assert np.unique(tokens).size == 51
        labelled = labels != IGNORE
        assert np.array_equal(labels[:, :-1][labelled[:, :-1]], tokens[:, 1:][labelled[:, :-1]])
    turns = rows_of(make("permutation", "random", False))[0] // 17
    assert np.bincount(turns.ravel()) / turns.size == pytest.approx(1 / N, abs=0.02)


def test_motifs_are_drawn_evenly():
    tokens, _ = rows_of(make("repeat", "round_robin", True, vocab_size=9), 3000)
    streams = tokens.reshape(3000, 16, N).swapaxes(1, 2).reshape(-1, 16)
    motifs = [len(set(row)) for row in streams.tolist()]
    assert np.bincount(motifs)[2:] / len(motifs) == pytest.approx(1 / 6, abs=0.02)
    for place in range(2):
        assert np.bincount(streams[:, place]) / len(streams) == pytest.approx(1 / 9, abs=0.02)


def test_permutations_belong_to_the_task_and_not_to_the_seed():
    drawn = [
        rows_of(make("permutation", "round_robin", True, seed=s, task_seed=t)) for s, t in ((1, 0), (2, 0), (1, 1))
    ]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])


@pytest.mark.parametrize(("width", "warned"), [(64, ["n/d", "L/d"]), (8, []), (4, []), (40, ["n/d", "L/d"])])
def test_a_width_that_the_streams_need_not_share_is_reported(monkeypatch, width, warned):
    messages, warnings = [], []
    monkeypatch.setattr("datamodules.interleaved_streams.rank_zero_info", messages.append)
    monkeypatch.setattr("datamodules.interleaved_streams.rank_zero_warn", warnings.append)
    data = make("iid", "round_robin", True, vocab_size=80)
    data.trainer = SimpleNamespace(global_rank=0, world_size=1, lightning_module=SimpleNamespace(width=width))
    for stage in ("fit", "test"):
        data.setup(stage)
    assert messages == [
        f"InterleavedStreams: n/d (tokens over width) is {80 / width:.3g}, L/d (positions) {48 / width:.3g}"
    ]
    assert [name for name in ("n/d", "L/d") if any(name in warning for warning in warnings)] == warned
    assert len(warnings) == len(warned)


def test_a_module_without_a_width_is_not_measured(monkeypatch):
    monkeypatch.setattr("datamodules.interleaved_streams.rank_zero_info", pytest.fail)
    make("iid", "round_robin", True).setup("fit")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"n_streams": 0}, "data.n_streams must be at least 1"),
        ({"interleave": "random"}, "data.interleave 'random' needs data.shared_vocab false: a shared token does not"),
        ({"rule": "repeat", "vocab_size": 6}, "gives a stream 6 tokens, and 'repeat' needs 7"),
        ({"vocab_size": 3, "shared_vocab": False}, "gives a stream 1 tokens, and 'permutation' needs 2"),
        ({"rule": "affine", "seq_len": 5}, "data.seq_len 5 is too short: 'affine' with 2 streams needs 6"),
        ({"rule": "iid", "seq_len": 0}, "data.seq_len must be at least 1, not 0"),
    ],
)
def test_user_errors(options, reason):
    with pytest.raises(ValueError, match=reason):
        InterleavedStreams(**options)
