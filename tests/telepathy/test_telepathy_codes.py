"""Bottlenecks: codes at the scale of their inputs, gradients, the measure of their use."""

import math
from functools import partial

import pytest
import torch
from conftest import SMALL

from datamodules import WordProblems
from datamodules.errors import UserError
from lightning_modules.telepathy import PerceiverBridge
from lightning_modules.telepathy.bottleneck import CODES, LEVELS, make_bottleneck
from lightning_modules.telepathy.code_use import CodeUse
from lightning_modules.telepathy.objectives import code_entropy

WIDTH = 16
PERCEIVER = partial(PerceiverBridge, soft_tokens=9, heads=2, width=16)


def made(name: str, flaws: tuple[str, ...] = ()):
    torch.manual_seed(0)
    return make_bottleneck(name, WIDTH, flaws)


def soft(count: int = 200) -> torch.Tensor:
    return torch.randn(4, count // 4, WIDTH, generator=torch.Generator().manual_seed(1))


def coded(bottleneck, soft_BKD: torch.Tensor):
    return bottleneck(soft_BKD, torch.ones(soft_BKD.shape[:2], dtype=torch.bool))


@torch.no_grad()
def test_a_vector_becomes_the_nearest_code():
    bottleneck = made("vq", ("bare_codes",))
    unit_BKD = soft() / soft().square().mean(-1, keepdim=True).sqrt()
    vectors_BKD, codes = coded(bottleneck, 3 * soft())  # the size of the input is not in its code
    codebook_VD = bottleneck.quantizer.codebook
    distance_BKV = (unit_BKD[:, :, None] - codebook_VD).norm(dim=-1)
    assert (codes.index_BK == distance_BKV.argmin(-1)).all()
    torch.testing.assert_close(vectors_BKD, codebook_VD[codes.index_BK], atol=1e-4, rtol=1e-4)
    nearest_BK = distance_BKV.amin(-1).square() / WIDTH
    torch.testing.assert_close(codes.commitment_BK, 1.25 * nearest_BK, atol=1e-4, rtol=1e-3)


def test_the_codebook_has_the_scale_of_its_inputs_but_in_the_notes():
    sizes = {}
    for flaws in ((), ("codebook_scale",)):
        bottleneck = made("vq", flaws)
        _, codes = coded(bottleneck, soft())
        sizes[flaws] = bottleneck.quantizer.codebook.square().mean().sqrt().item(), codes.commitment_BK.mean().item()
    _, codes = coded(bottleneck, 3 * soft())  # near codes of nearly 0, inputs keep their own size
    assert codes.commitment_BK.mean().item() == pytest.approx(9 * sizes[("codebook_scale",)][1], rel=0.01)
    assert sizes[()][0] == pytest.approx(1, abs=0.05)
    assert sizes[("codebook_scale",)][0] == pytest.approx(1 / (CODES * 3**0.5), rel=0.05)
    assert sizes[()][1] < 0.7 * 1.25 < 0.95 * 1.25 < sizes[("codebook_scale",)][1]  # all codes are equally far


@pytest.mark.parametrize("name", ["vq", "fsq"])
def test_gradients_reach_the_bridge_and_every_parameter(name):
    bottleneck, soft_BKD = made(name), soft().requires_grad_()
    vectors_BKD, codes = coded(bottleneck, soft_BKD)
    (vectors_BKD.square().sum(-1).sin().sum() + codes.commitment_BK.sum()).backward()
    assert soft_BKD.grad.isfinite().all()
    assert (soft_BKD.grad.abs().sum(-1) > 0).all()
    assert [n for n, p in bottleneck.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("name", ["vq", "fsq"])
@torch.no_grad()
def test_a_code_stands_for_one_vector_in_all_dimensions_of_the_target(name):
    ranks = []
    for flaws in ((), ("bare_codes",)):
        bottleneck = made(name, flaws)
        vectors_BKD, codes = coded(bottleneck, soft(2000))
        for code in codes.index_BK.unique()[:5]:
            same_ND = vectors_BKD[codes.index_BK == code]
            torch.testing.assert_close(same_ND, same_ND[:1].expand_as(same_ND), atol=1e-4, rtol=1e-4)
        vectors_ND = vectors_BKD.flatten(0, 1)
        ranks.append(torch.linalg.matrix_rank(vectors_ND - vectors_ND.mean(0), rtol=1e-3).item())
    assert ranks == [WIDTH, {"vq": WIDTH, "fsq": 5}[name]]  # five numbers by a linear map reach five dimensions


def test_the_commitment_moves_the_codebook_towards_the_inputs():
    bottleneck = made("vq")
    _, codes = coded(bottleneck, soft())
    codes.commitment_BK.mean().backward()
    torch.optim.Adam(bottleneck.parameters(), lr=0.05).step()
    before_VD = made("vq").quantizer.codebook
    assert (bottleneck.quantizer.codebook - before_VD).abs().max() < 0.05 * before_VD.abs().max()  # it moves slowly
    _, moved = coded(bottleneck, soft())
    assert moved.commitment_BK.mean() < codes.commitment_BK.mean()


def test_the_commitment_of_a_code_weighs_four_times_that_of_its_input():
    bottleneck, soft_BKD = made("vq", ("codebook_scale",)), soft().requires_grad_()
    _, codes = coded(bottleneck, soft_BKD)
    book_DD = bottleneck.quantizer.code_transform.change_DD
    grads = torch.autograd.grad(codes.commitment_BK.sum(), (soft_BKD, book_DD))
    far_BKD = bottleneck.quantizer.codebook[codes.index_BK] - soft_BKD
    (soft_grad_BKD,) = torch.autograd.grad(far_BKD.square().mean(-1).sum(), soft_BKD, retain_graph=True)
    (book_grad_DD,) = torch.autograd.grad(far_BKD.square().mean(-1).sum(), book_DD)
    torch.testing.assert_close(grads, (0.25 * soft_grad_BKD, book_grad_DD))


@torch.no_grad()
def test_scalars_are_rounded_to_their_levels():
    bottleneck = made("fsq")
    _, codes = coded(bottleneck, soft(800))
    digits = bottleneck.quantizer.indices_to_level_indices(codes.index_BK)
    assert bottleneck.size == math.prod(LEVELS)
    assert [set(digits[..., f].flatten().tolist()) <= set(range(n)) for f, n in enumerate(LEVELS)] == [True] * 5
    assert codes.index_BK.unique().numel() > 100
    assert (codes.commitment_BK == 0).all()


@pytest.mark.parametrize("name", ["vq", "fsq"])
def test_the_soft_assignment_agrees_with_the_codes(name):
    bottleneck, soft_BKD = made(name), soft().requires_grad_()
    share_BKFV = bottleneck.shares(soft_BKD)
    torch.testing.assert_close(share_BKFV.sum(-1), torch.ones_like(share_BKFV[..., 0]))
    codes = coded(bottleneck, soft_BKD)[1].index_BK
    if name == "vq":
        assert (share_BKFV[:, :, 0].argmax(-1) == codes).all()
        unit_BKD = soft_BKD / soft_BKD.square().mean(-1, keepdim=True).sqrt()
        squares_BKV = (unit_BKD[:, :, None] - bottleneck.quantizer.codebook).square().sum(-1)
        torch.testing.assert_close(share_BKFV[:, :, 0], (-squares_BKV / WIDTH**0.5).softmax(-1), atol=1e-5, rtol=1e-3)
    else:
        assert [bool(share_BKFV[..., f, count:].any()) for f, count in enumerate(LEVELS)] == [False] * 5
        bends = share_BKFV.where(share_BKFV > 1e-30, torch.nan).log().diff(dim=-1).diff(dim=-1)  # of -4 (u - l)²
        assert bends[bends.isfinite()].tolist() == pytest.approx([-8.0] * int(bends.isfinite().sum()), abs=0.01)
        assert (share_BKFV.argmax(-1) == bottleneck.quantizer.indices_to_level_indices(codes)).float().mean() > 0.99
    share_BKFV[..., 0].sum().backward()
    assert soft_BKD.grad.abs().sum() > 0


@pytest.mark.parametrize("name", ["vq", "fsq"])
def test_the_entropy_of_codes_has_finite_gradients_towards_more_codes(name):
    bottleneck, soft_BKD = made(name), soft(40).requires_grad_()
    share_BKFV = bottleneck.shares(0.1 * soft_BKD.detach()[:1, :1] + 1e-3 * soft_BKD)  # nearly one code for all
    loss = code_entropy(share_BKFV.mean((0, 1)), bottleneck.size)
    loss.backward()
    assert soft_BKD.grad.isfinite().all()
    assert soft_BKD.grad.abs().sum() > 0
    assert 0 < loss < 1


@pytest.mark.parametrize("flaws", [(), ("untrained_output",)])
def test_without_codes_there_are_no_factors(flaws):
    share_BKFV = made("none", flaws).shares(soft())
    assert share_BKFV.shape == (4, 50, 0, 1)
    assert share_BKFV.sum() == 0


@pytest.mark.parametrize("name", ["vq", "fsq"])
def test_quantisation_is_fp32_under_autocast_and_finite_for_zeros(name):
    bottleneck = made(name)
    with torch.autocast("cpu", torch.bfloat16):
        low_BKD, low = coded(bottleneck, soft())
        low_BKFV = bottleneck.shares(soft())
    torch.testing.assert_close(low_BKFV, bottleneck.shares(soft()))
    high_BKD, high = coded(bottleneck, soft())
    assert low_BKD.dtype == torch.float32
    assert torch.equal(low.index_BK, high.index_BK)
    torch.testing.assert_close(low_BKD, high_BKD)
    zeros_BKD = torch.zeros(2, 3, WIDTH, requires_grad=True)
    vectors_BKD, codes = coded(bottleneck, zeros_BKD)
    (vectors_BKD.sum() + codes.commitment_BK.sum()).backward()
    assert zeros_BKD.grad.isfinite().all()


def test_perplexity_counts_equally_used_codes_over_all_batches():
    use = CodeUse(50)
    use.update(torch.arange(20))
    use.update(torch.arange(20, 40))
    assert use.compute().item() == pytest.approx(40)
    use.reset()
    use.update(torch.tensor([3] * 8))
    assert use.compute().item() == pytest.approx(1)
    use.update(torch.tensor([4] * 4))
    assert use.compute().item() == pytest.approx(math.exp(-(2 / 3) * math.log(2 / 3) - (1 / 3) * math.log(1 / 3)))


@pytest.mark.parametrize("name", ["vq", "fsq"])
def test_the_perplexity_is_measured_in_validation_and_test_in_any_batches(telepathy, fit, name):
    found, losses = set(), []
    for size in (5, 16):
        module = telepathy(PERCEIVER, bottleneck=name, max_new_tokens=2)
        data = WordProblems(**SMALL | {"eval_batch_size": size})
        trainer = fit(module, 1, data, limit_val_batches=1.0, val_check_interval=1)
        validated = trainer.callback_metrics["validation/code_perplexity"].item()
        trainer.test(module, datamodule=data, verbose=False)
        tested = trainer.callback_metrics["test/code_perplexity"].item()
        codes = module.eval().encode(module.collate(data.eval_problems["test"], False))
        mask_BK = module.collate(data.eval_problems["test"], False)["soft_mask"]
        share_V = torch.unique(codes.codes.index_BK[mask_BK], return_counts=True)[1] / mask_BK.sum()
        assert tested == pytest.approx(torch.special.entr(share_V).sum().exp().item(), rel=1e-5)
        assert 1 < validated < 144
        found.add((round(validated, 3), round(tested, 3)))
        losses.append(trainer.validate(module, datamodule=data, verbose=False)[0]["validation/loss"])
    assert len(found) == 1
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)  # the mean over tokens, of batches with different numbers


def test_an_untrained_output_is_a_fixed_map(telepathy):
    module = telepathy(PERCEIVER, reproduce_flaws=["untrained_output"])
    assert module.bottleneck.map.weight.requires_grad is False
    assert module.bottleneck.map.weight.square().sum(1).mean().item() == pytest.approx(1, rel=0.1)  # it keeps the scale
    assert "bottleneck.map.weight" in module.state_dict()
    plain = telepathy(PERCEIVER, bottleneck=None, normalizer=None)  # as a config with null makes it
    assert (plain.bottleneck.size, type(plain.normalizer)) == (0, torch.nn.Identity)


def test_soft_tokens_of_early_training_go_on_as_they_are_and_become_codes():
    bottleneck, soft_BKD = made("vq"), soft(400)
    unit_BKD = soft_BKD / soft_BKD.square().mean(-1, keepdim=True).sqrt()
    bottleneck.progress = 0.5
    vectors_BKD, codes = coded(bottleneck, soft_BKD)
    torch.testing.assert_close(vectors_BKD, unit_BKD)  # the reader adds nothing at the start
    assert (codes.commitment_BK == 0).all()
    for _ in range(10):
        coded(bottleneck, soft_BKD)
    bottleneck.progress = 0.9
    _, codes = coded(bottleneck, soft_BKD)
    assert codes.commitment_BK.max() < 1e-6  # all 400 have become codes
    before_VD = bottleneck.quantizer.frozen_codebook.clone()
    bottleneck.eval()
    bottleneck.progress = 0.5
    assert coded(bottleneck, soft_BKD)[1].index_BK.equal(codes.index_BK)  # evaluation has codes at any time
    assert bottleneck.quantizer.frozen_codebook.equal(before_VD)


@pytest.mark.parametrize("flaw", ["bare_codes", "codebook_scale"])
def test_the_codes_of_the_notes_are_there_from_the_start(flaw):
    bottleneck = made("vq", (flaw,))
    before_VD = bottleneck.quantizer.frozen_codebook.clone()
    bottleneck.progress = 0.0
    assert coded(bottleneck, soft())[1].commitment_BK.min() > 0
    assert bottleneck.quantizer.frozen_codebook.equal(before_VD)


def test_the_module_tells_the_progress_of_training(telepathy, fit):
    module = telepathy(PERCEIVER, bottleneck="vq")
    fit(module, 4, WordProblems(**SMALL))
    assert module.bottleneck.progress == 0.75
    assert module.bottleneck.oldest > 0


@pytest.mark.parametrize("lost", [0, 1])
def test_padding_and_what_is_not_finite_become_no_code(lost):
    bottleneck, soft_BKD = made("vq"), soft(40)
    bottleneck.progress = 0.5
    mask_BK = torch.ones(soft_BKD.shape[:2], dtype=torch.bool)
    mask_BK[:, 3:] = False
    before_VD = bottleneck.quantizer.codebook.detach().clone()
    soft_BKD[:lost, 0] = torch.nan
    bottleneck(soft_BKD.masked_fill(~mask_BK[..., None], 50.0), mask_BK)
    mask_BK[:lost, 0] = False
    after_VD = bottleneck.quantizer.codebook.detach()
    real_ND = soft_BKD[mask_BK] / soft_BKD[mask_BK].square().mean(-1, keepdim=True).sqrt()
    count = 12 - lost
    assert bottleneck.oldest == len(real_ND) == count
    assert torch.cdist(real_ND, after_VD[:count]).amin(1).max() < 1e-3
    assert after_VD[count:].equal(before_VD[count:])


def test_codes_that_come_late_need_the_last_step(telepathy, fit):
    module = telepathy(PERCEIVER, bottleneck="vq", schedule="constant")
    with pytest.raises(
        UserError, match=r"trainer.max_steps must be set: model.bottleneck vq makes codes in the last fifth"
    ):
        fit(module, -1, WordProblems(**SMALL), max_epochs=-1)
