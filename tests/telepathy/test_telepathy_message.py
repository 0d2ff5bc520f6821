"""The size of a message, and figures of soft tokens that are not finite."""

import gzip
import math

import numpy as np
import pytest

from datamodules.problems import generate
from lightning_modules.pretrained.answers import Answer
from lightning_modules.telepathy.figures import cosine_map, loss_by_position, principal_components, soft_token_map
from lightning_modules.telepathy.layout import Row
from lightning_modules.telepathy.measures import measure
from lightning_modules.telepathy.message import add_message_sizes, deflated_bits
from lightning_modules.telepathy.results import Measures, ProblemResult

ROW = Row([0], 1, [1, 2])
PROBLEMS = [generate(3, "train", index) for index in range(40)]
QUESTIONS = [problem.question for problem in PROBLEMS]


def results(codes: bool = False) -> list[ProblemResult]:
    """Return results with 4 or 6 soft tokens by turns; a code is the row's number modulo 8."""
    losses = {name: np.ones(2) for name in ("bridge", "zero", "text", "none")}
    answers = {name: Answer("", False) for name in ("bridge", "text")}
    return [
        ProblemResult(problem, ROW, n, answers, losses, np.full(n, i % 8) if codes else None)
        for i, (problem, n) in enumerate(zip(PROBLEMS, [4, 6] * 20, strict=True))
    ]


def sizes(of: list[ProblemResult], codes: int) -> Measures:
    measures = measure(of)
    add_message_sizes(of, 96, codes, measures)
    return measures


def test_bits_of_soft_tokens_and_of_codes():
    continuous, coded = sizes(results(), 0), sizes(results(codes=True), 4096)
    assert continuous.values["soft_bits"] == 5 * 96 * 16
    assert coded.values["soft_bits"] == 5 * 12
    assert 2.9 < coded.values["code_bits"] / 5 < 3  # eight codes, not quite equally often
    assert coded.values["code_bits"] == pytest.approx(5 * math.log2(coded.values["code_perplexity"]))
    assert "code_bits" not in continuous.values
    assert {continuous.counts[name] for name in ("soft_bits", "text_bits", "gzip_bits", "gzip_set_bits")} == {40}


def test_bits_of_the_text():
    values = sizes(results(), 0).values
    assert values["text_bits"] == pytest.approx(8 * np.mean([len(question) for question in QUESTIONS]))
    # gzip's header has 10 bytes and its end 8
    assert deflated_bits(QUESTIONS[0]) == 8 * (len(gzip.compress(QUESTIONS[0].encode(), 9)) - 18)
    assert deflated_bits("Ångström") == 8 * (len(gzip.compress("Ångström".encode(), 9)) - 18)
    assert values["gzip_bits"] == pytest.approx(np.mean([deflated_bits(question) for question in QUESTIONS]))
    assert 0.2 * values["text_bits"] < values["gzip_set_bits"] < 0.7 * values["gzip_bits"] < values["text_bits"]


def test_principal_components_of_a_plane():
    plane = np.random.default_rng(0).normal(size=(50, 2)) * [3.0, 1.0]
    axes = np.linalg.qr(np.random.default_rng(1).normal(size=(7, 2)))[0]
    points, shares = principal_components(plane @ axes.T + 5)
    assert sum(shares) == pytest.approx(1)
    assert shares[0] == pytest.approx(0.9, abs=0.05)
    assert np.abs(np.corrcoef(points[:, 0], plane[:, 0])[0, 1]) > 0.95


@pytest.mark.parametrize("lost", [0, 1, 4, 5])
def test_inputs_that_are_not_finite_are_left_out_of_the_map(lost):
    soft = np.random.default_rng(0).normal(size=(5, 6))
    soft[:lost, 2] = [np.nan, np.inf, -np.inf, np.nan, np.nan][:lost]
    figure = soft_token_map(soft, list("aabbc"))
    (axes,) = figure.axes
    assert sum(len(points.get_offsets()) for points in axes.collections) == 5 - lost
    assert ("not finite" in axes.get_title()) == (lost > 0)
    cosines = cosine_map(soft, list("aabbc")).axes[0].images[0].get_array()
    assert cosines.count() == (5 - lost) ** 2  # of numbers that are not masked


def test_soft_tokens_and_cosines_are_drawn_by_template():
    soft, templates = np.random.default_rng(0).normal(size=(5, 6)), list("cabca")
    (axes,) = (figure := soft_token_map(soft, templates)).axes
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["a", "b", "c"]
    points, _ = principal_components(soft)
    drawn = {one.get_label(): np.asarray(one.get_offsets()).tolist() for one in axes.collections}
    assert drawn == {"a": points[[1, 4]].tolist(), "b": points[[2]].tolist(), "c": points[[0, 3]].tolist()}
    unit = soft / np.linalg.norm(soft, axis=1, keepdims=True)
    order = [1, 4, 2, 0, 3]
    np.testing.assert_allclose(
        cosine_map(soft, templates).axes[0].images[0].get_array(), (unit @ unit.T)[order][:, order]
    )


def test_the_loss_by_position_is_the_mean_over_the_answers_that_have_it():
    rows = [[1.0, 2.0], [3.0]] + [[2.0, 5.0, 8.0]] * 17 + [[9.0] * 40]
    losses = [{"text": np.array(row) + 1, "bridge": np.array(row)} for row in rows]
    losses[0]["text"][1] = np.nan  # of a model that diverged: no mean over the others
    lines = loss_by_position(losses).axes[0].lines
    assert [line.get_label() for line in lines] == ["bridge", "text"]
    # One answer in twenty is longer, and is not drawn to its end
    wanted = [(1 + 3 + 17 * 2 + 9) / 20, (2 + 17 * 5 + 9) / 19, (17 * 8 + 9) / 18]
    np.testing.assert_allclose(lines[0].get_ydata(), wanted)
    np.testing.assert_allclose(lines[1].get_ydata(), [wanted[0] + 1, np.nan, wanted[2] + 1])
