"""Objectives against closed forms."""

import math

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from lightning_modules.core.diversity import mean_pairwise_cosine
from lightning_modules.telepathy import objectives as objective

DIRECTIONS_BF = torch.eye(8)


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_lm_is_the_mean_cross_entropy_in_nats():
    assert objective.lm(torch.zeros(6, 10), torch.arange(6)).item() == pytest.approx(math.log(10))
    logits_NV = random(6, 10)
    own_N = logits_NV.softmax(-1)[torch.arange(6), torch.arange(6)]
    torch.testing.assert_close(objective.lm(logits_NV, torch.arange(6)), -own_N.log().mean())


def test_batch_diversity_is_the_mean_cosine_between_inputs():
    assert objective.batch_diversity(random(1, 9).expand(5, -1)).item() == pytest.approx(1, abs=1e-6)
    assert objective.batch_diversity(3 * DIRECTIONS_BF).item() == pytest.approx(0, abs=1e-6)
    assert objective.batch_diversity(torch.stack([random(9), -random(9)])).item() == pytest.approx(-1, abs=1e-6)
    assert objective.batch_diversity(random(1, 9)).item() == pytest.approx(0, abs=1e-6)  # nothing to compare with
    torch.testing.assert_close(objective.batch_diversity(random(6, 9)), mean_pairwise_cosine(random(6, 9)))


@pytest.mark.parametrize("rows", [1, 3])
def test_batch_diversity_over_ranks_gathers_sums_alone(rows):
    whole_BF, gathered = random(2 * rows, 9).requires_grad_(), []
    parts = whole_BF.split(rows)
    results = [[], []]  # of the two ranks, in the order of their calls

    def recorder(rank: int):
        def gather(x: torch.Tensor) -> torch.Tensor:
            results[rank].append(x)
            return x.repeat(2, *[1] * (x.dim() - 1))

        return gather

    for rank, part in enumerate(parts):
        objective.batch_diversity(part, recorder(rank))

    def both(x: torch.Tensor) -> torch.Tensor:
        place = len(gathered)
        gathered.append(x)
        return torch.cat([results[0][place], results[1][place]])

    loss = objective.batch_diversity(parts[0], both)
    torch.testing.assert_close(loss, objective.batch_diversity(whole_BF))
    ours, expected = (torch.autograd.grad(value, whole_BF)[0] for value in (loss, mean_pairwise_cosine(whole_BF)))
    torch.testing.assert_close(ours, expected)
    assert max(len(x) for x in gathered) == 1


def test_contrastive_of_matched_pairs_vanishes_and_of_unrelated_ones_is_ln_n_or_more():
    offset_B1 = 5.0  # what all inputs share does not help
    assert objective.contrastive(DIRECTIONS_BF + offset_B1, 2 * DIRECTIONS_BF).item() < 1e-4
    assert objective.contrastive(random(8, 16), random(8, 16)).item() < 1e-2
    constant_BF = random(1, 16).expand(8, -1)
    assert objective.contrastive(constant_BF, random(8, 16)).item() == pytest.approx(math.log(8), abs=1e-3)
    wide = [objective.contrastive(random(64, 4096, seed=s), random(64, 4096, seed=s + 9)).item() for s in range(4)]
    assert sum(wide) / 4 == pytest.approx(math.log(64), abs=0.15)
    assert objective.contrastive(DIRECTIONS_BF, DIRECTIONS_BF.roll(1, 0)).item() > math.log(8)
    swapped = objective.contrastive(random(8, 16, seed=1), random(8, 16, seed=2))
    torch.testing.assert_close(objective.contrastive(random(8, 16, seed=2), random(8, 16, seed=1)), swapped)


def test_kl_text_is_the_divergence_from_the_teacher():
    student_NV, teacher_NV = random(6, 10), 2 * random(6, 10, seed=1)
    assert objective.kl_text(teacher_NV + 3, teacher_NV).item() == pytest.approx(0, abs=1e-6)
    wanted = kl_divergence(Categorical(logits=teacher_NV), Categorical(logits=student_NV)).mean()
    torch.testing.assert_close(objective.kl_text(student_NV, teacher_NV), wanted)
    student_NV.requires_grad_()
    (grad_NV,) = torch.autograd.grad(objective.kl_text(student_NV, teacher_NV), student_NV)
    torch.testing.assert_close(grad_NV, (student_NV.softmax(-1) - teacher_NV.softmax(-1)).detach() / 6)


@pytest.mark.parametrize("name", ["lm", "batch_diversity", "contrastive", "kl_text"])
def test_each_objective_trains_through_the_trainer(telepathy, fit, name):
    module = telepathy(objectives={name: 0.5})
    before = {key: value.clone() for key, value in module.state_dict().items()}
    trainer = fit(module, 2)
    logged = trainer.callback_metrics
    assert set(logged) == {f"train/{name}", "train/loss"}
    assert logged["train/loss"] == logged[f"train/{name}"]
    assert math.isfinite(logged["train/loss"])
    still = {key for key, value in module.state_dict().items() if torch.equal(value, before[key])}
    assert still <= ({"soft_tokens.scale", "bridge.end_D"} if name in ("batch_diversity", "contrastive") else set())


def test_objectives_are_summed_with_their_weights(telepathy, fit):
    weights = {"lm": 1.0, "batch_diversity": 0.1, "contrastive": 0.2, "kl_text": 0.3}
    alone = {}
    for name in weights:
        logged = fit(telepathy(objectives={name: 1.0}), 1).callback_metrics
        alone[name] = logged[f"train/{name}"].item()
    logged = fit(telepathy(objectives=weights), 1).callback_metrics
    for name, weight in weights.items():
        assert logged[f"train/{name}"].item() == pytest.approx(weight * alone[name], rel=1e-5, abs=1e-6)
    assert logged["train/loss"].item() == pytest.approx(sum(w * alone[n] for n, w in weights.items()), rel=1e-5)


@pytest.mark.parametrize("objectives", [{}, {"lm": 0.0}])
def test_no_objective_is_refused(telepathy, objectives):
    with pytest.raises(ValueError, match="give at least one objective a weight"):
        telepathy(objectives=objectives)


def masked(*shape: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random soft tokens and a mask with holes at the ends of rows."""
    count_B = torch.arange(shape[0]) % shape[1] + 1
    return random(*shape), torch.arange(shape[1]) < count_B[:, None]


@pytest.mark.parametrize("distance", ["cosine", "mse"])
def test_anchor_is_the_distance_of_centred_means(distance):
    soft_BD, text_BD = random(5, 7), random(5, 7, seed=1)
    by_hand = []
    for i in range(5):
        soft_D, text_D = soft_BD[i] - soft_BD.mean(0), text_BD[i] - text_BD.mean(0)
        cosine = (soft_D @ text_D / (soft_D.norm() * text_D.norm())).item()
        by_hand.append(1 - cosine if distance == "cosine" else ((soft_D - text_D) ** 2).mean().item())
    assert objective.anchor(soft_BD, text_BD, distance).item() == pytest.approx(sum(by_hand) / 5, rel=1e-5)


def test_one_vector_for_all_inputs_satisfies_an_anchor_that_is_not_centred():
    common_BD = 5.0 + 0.1 * random(6, 32, seed=1)
    constant_BD = torch.full((6, 32), 5.0)
    assert objective.anchor(constant_BD, common_BD, "cosine", centred=False).item() < 0.01
    assert objective.anchor(constant_BD, common_BD, "cosine").item() == pytest.approx(1)


def test_bag_of_words_has_a_half_for_present_and_a_half_for_absent_words():
    logits_BV, present_BV = random(3, 6), torch.arange(6) % 3 < torch.tensor([[1], [2], [1]])
    by_hand = 0.0
    for i in range(3):
        present = [-math.log(torch.sigmoid(x).item()) for x in logits_BV[i][present_BV[i]]]
        absent = [-math.log(1 - torch.sigmoid(x).item()) for x in logits_BV[i][~present_BV[i]]]
        by_hand += (sum(present) / len(present) + sum(absent) / len(absent)) / 2
    assert objective.bag_of_words(logits_BV, present_BV).item() == pytest.approx(by_hand / 3, rel=1e-5)
    rare_BV = torch.zeros(4, 1000, dtype=torch.bool)
    rare_BV[:, :5] = True
    base = objective.bag_of_words(torch.full((4, 1000), math.log(0.005)), rare_BV).item()
    assert base > math.log(2)  # the base rate alone earns nothing


def test_first_tokens_is_a_weighted_mean():
    logits_NV, labels_N, weight_N = random(6, 10), torch.arange(6), torch.tensor([9.0, 9.0, 1, 1, 9.0, 1])
    each_N = -logits_NV.log_softmax(-1)[torch.arange(6), labels_N]
    wanted = sum(w * x for w, x in zip(weight_N.tolist(), each_N.tolist(), strict=True)) / weight_N.sum().item()
    assert objective.first_tokens(logits_NV, labels_N, weight_N).item() == pytest.approx(wanted, rel=1e-5)


def test_separation_is_the_distance_to_the_nearest_other_input():
    soft_BF = random(6, 9)
    unit = [row / row.norm() for row in soft_BF]
    nearest = [min((unit[i] - unit[j]).norm().item() for j in range(6) if j != i) for i in range(6)]
    wanted = sum(max(0.0, 1.2 - distance) for distance in nearest) / 6
    assert objective.separation(soft_BF, 1.2).item() == pytest.approx(wanted, abs=1e-5)
    assert wanted > 0
    two_clusters_BF = torch.cat([random(1, 9).expand(3, -1), -random(1, 9).expand(3, -1)])
    assert objective.batch_diversity(two_clusters_BF).item() < 0
    assert objective.separation(two_clusters_BF, 1.0).item() == pytest.approx(1, abs=1e-4)
    assert objective.separation(random(1, 9), 1.0).item() == 0


def test_position_variance_is_taken_over_inputs_at_each_position():
    soft_BKD, mask_BK = masked(6, 4, 3)
    variances = []
    for k in range(4):
        real_ND = soft_BKD[mask_BK[:, k], k]
        if len(real_ND) > 1:
            variances += ((real_ND - real_ND.mean(0)) ** 2).mean(0).tolist()
    square = (soft_BKD[mask_BK] ** 2).mean().item()
    wanted = -math.log(sum(variances) / len(variances) / square)
    assert objective.position_variance(soft_BKD, mask_BK).item() == pytest.approx(wanted, abs=1e-4)
    spoilt_BKD = soft_BKD.masked_fill(~mask_BK[..., None], 100.0)
    assert objective.position_variance(spoilt_BKD, mask_BK).item() == pytest.approx(wanted, abs=1e-4)
    assert objective.position_variance(7 * soft_BKD, mask_BK).item() == pytest.approx(wanted, abs=1e-4)


def test_equal_inputs_satisfy_a_variance_over_inputs_and_positions():
    same_BKD = random(1, 8, 5).expand(6, -1, -1)
    mask_BK = torch.ones(6, 8, dtype=torch.bool)
    assert objective.position_variance(same_BKD, mask_BK, pooled=True).item() < 0.2
    assert objective.position_variance(same_BKD, mask_BK).item() > 10


def test_code_entropy_is_0_for_equal_use_and_1_for_one_code():
    assert objective.code_entropy(torch.full((2, 4), 0.25), 16).item() == pytest.approx(0, abs=1e-6)
    assert objective.code_entropy(torch.eye(4)[:2], 16).item() == pytest.approx(1, abs=1e-6)
    share_FV = random(2, 4).softmax(-1)
    by_hand = -sum(p * math.log(p) for p in share_FV.flatten().tolist()) / math.log(16)
    assert objective.code_entropy(share_FV, 16).item() == pytest.approx(1 - by_hand, rel=1e-5)


# What all objectives read of a step, on one rank and on two


def test_a_variance_over_one_input_is_nothing():
    soft_BKD = torch.randn(1, 5, 4, requires_grad=True)
    value = objective.position_variance(soft_BKD, torch.ones(1, 5, dtype=torch.bool))
    value.backward()
    assert value == 0
    assert (soft_BKD.grad == 0).all()
