"""NoisySuccessor: tokens follow as often as the class says, and its best loss is the entropy of what follows."""

import math

import numpy as np
import pytest

from datamodules import NoisySuccessor
from datamodules.sequence_task import stream


def successors(data, count=2000):
    tokens, labels = data.draw(stream(5), count).swapaxes(0, 1)
    assert np.array_equal(tokens[:, 1:], labels[:, :-1])
    return tokens, labels, labels == (tokens + 1) % data.vocab_size


def test_rows_follow_the_law():
    data = NoisySuccessor(vocab_size=5, jump=0.3, seq_len=40)
    tokens, labels, followed = successors(data)
    assert abs(followed.mean() - (0.7 + 0.3 / 5)) < 4 * (0.25 / followed.size) ** 0.5
    assert data.ceiling == pytest.approx(0.76)
    jumped = np.bincount((labels - tokens)[~followed] % 5, minlength=5)
    assert jumped[1] == 0
    assert abs(jumped[[0, 2, 3, 4]] / jumped.sum() - 0.25).max() < 0.02
    first = np.bincount(tokens[:, 0], minlength=5) / len(tokens)
    assert abs(first - 0.2).max() < 0.05


def test_the_best_loss_is_that_of_a_model_that_knows_the_law():
    data = NoisySuccessor(vocab_size=5, jump=0.3, seq_len=40)
    _, _, followed = successors(data)
    losses = np.where(followed, -math.log(0.76), -math.log(0.06))
    assert data.best_loss == pytest.approx(losses.mean(), abs=0.01)
    # The pattern of the notes, whose perplexity is 14 and not 4
    assert math.exp(NoisySuccessor(vocab_size=900).best_loss) == pytest.approx(14.14, abs=0.01)
    assert NoisySuccessor(vocab_size=7, jump=0).best_loss == 0
    assert NoisySuccessor(vocab_size=7, jump=1).best_loss == pytest.approx(math.log(7))


def test_user_errors():
    with pytest.raises(ValueError, match=r"data\.jump must be at most 1"):
        NoisySuccessor(jump=1.5)
    with pytest.raises(ValueError, match="is not a row of numbers from 0 to 899"):
        NoisySuccessor().parse("1 900")
