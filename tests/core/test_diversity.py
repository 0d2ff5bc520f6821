"""Every measure against a case whose value is known in closed form."""

import math

import pytest
import torch

from lightning_modules.core.diversity import (
    between_input_variance,
    cosine_matrix,
    distinct,
    distinct_n,
    effective_rank,
    mean_pairwise_cosine,
)


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_cosine_of_known_angles():
    # At 0, 60 and 90 degrees: the pairs are 60, 90 and 30 degrees apart.
    angles = torch.tensor([0.0, math.pi / 3, math.pi / 2], dtype=torch.double)
    x = torch.stack([angles.cos(), angles.sin()], dim=-1) * torch.tensor([[1.0], [5.0], [0.1]])
    a, b = 0.5, math.sqrt(3) / 2
    torch.testing.assert_close(cosine_matrix(x), torch.tensor([[1, a, 0], [a, 1, b], [0, b, 1]], dtype=torch.double))
    assert mean_pairwise_cosine(x).item() == pytest.approx((a + b) / 3)


def test_mean_cosine_is_that_of_the_matrix_off_the_diagonal():
    x = random(9, 5) + 0.5
    x[3] = 0  # without a direction: cosine 0 with all others
    off_diagonal = cosine_matrix(x)[~torch.eye(9, dtype=torch.bool)]
    torch.testing.assert_close(mean_pairwise_cosine(x), off_diagonal.mean())


@pytest.mark.parametrize(("x", "cosine"), [(torch.ones(4, 3), 1.0), (torch.eye(4), 0.0), (torch.zeros(4, 3), 0.0)])
def test_mean_cosine_at_its_ends(x, cosine):
    assert mean_pairwise_cosine(x).item() == pytest.approx(cosine, abs=1e-6)


def test_mean_cosine_of_one_input_is_undefined():
    assert mean_pairwise_cosine(torch.ones(1, 3)).isnan()


def test_half_precision_is_measured_in_fp32():
    x = torch.ones(300, 40, dtype=torch.bfloat16)  # 90 000 has no neighbour within 256 in bf16
    assert mean_pairwise_cosine(x).item() == pytest.approx(1.0, abs=1e-5)
    assert between_input_variance(x[:, None]).dtype == torch.float32


def test_variance_of_an_offset_and_a_deviation():
    # Inputs at c + d and c - d: the share is |d|² / (|c|² + |d|²), here 9 / 25 and 1, whatever the positions' scales.
    c, d = torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 3.0], [1e-3, 0.0]])
    x_BKD = torch.stack([c + d, c - d])
    assert between_input_variance(x_BKD).item() == pytest.approx((9 / 25 + 1) / 2)


def test_variance_sees_through_positions_that_differ():
    constant = random(1, 6, 4).expand(8, 6, 4)
    assert constant.flatten(0, 1).var() > 0.5
    assert between_input_variance(constant).item() == pytest.approx(0, abs=1e-10)
    assert between_input_variance(torch.zeros(8, 6, 4)).item() == 0


def test_variance_of_independent_inputs():
    assert between_input_variance(random(10, 50, 400)).item() == pytest.approx(0.9, abs=0.01)


def test_variance_does_not_take_padding_for_diversity():
    x_BKD = random(1, 5, 4).expand(6, 5, 4).clone()
    mask_BK = torch.arange(5) < torch.tensor([[1], [2], [3], [4], [4], [5]])
    x_BKD[~mask_BK] = torch.nan  # whatever stands there
    assert between_input_variance(x_BKD, mask_BK).item() == pytest.approx(0, abs=1e-10)
    assert between_input_variance(x_BKD.nan_to_num(0.0)).item() > 0.1
    # Position 4 is real in one input only and left out; vectors about zero at another count for one in four.
    x_BKD[3:, 3] = torch.tensor([[1.0], [-1.0], [0.0]])
    assert between_input_variance(x_BKD, mask_BK).item() == pytest.approx(0.25)


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_effective_rank_of_equal_directions(rank):
    # Plus and minus each of `rank` orthogonal directions: as many equal singular values, and a mean of zero.
    directions = torch.linalg.qr(random(20, rank)).Q.T
    x = torch.cat([directions, -directions]) + 7.0  # a common offset does not count
    assert effective_rank(x).item() == pytest.approx(rank, rel=1e-3)


def test_effective_rank_of_two_unequal_directions():
    x = torch.tensor([[3.0, 0.0], [-3.0, 0.0], [0.0, 1.0], [0.0, -1.0]])  # p = 3/4, 1/4
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert effective_rank(x).item() == pytest.approx(math.exp(entropy))


def test_the_effective_rank_of_values_that_are_not_finite_is_nan():
    x = random(6, 4)
    x[2, 1] = math.inf
    assert effective_rank(x).isnan()


def test_effective_rank_of_a_constant_is_not_that_of_its_rounding():
    assert effective_rank(random(1, 100).expand(64, 100) * 1e3).item() == 0


def test_distinct():
    assert distinct(["a", "b", "a", "a "]) == 0.75
    assert distinct(["a"] * 5) == 0.2
    assert math.isnan(distinct([]))


def test_distinct_n():
    texts = ["the cat sat", "the cat  ran", "one"]  # the-cat, cat-sat, the-cat, cat-ran
    assert distinct_n(texts, 2) == 0.75
    assert distinct_n(texts, 1) == 5 / 7
    assert distinct_n(texts, 3) == 1
    assert math.isnan(distinct_n(texts, 4))
