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
