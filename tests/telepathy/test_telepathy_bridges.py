"""The parts between the two models: bridges, output scale and normalizer."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import QUIET, SMALL
from lightning import Trainer

from datamodules import WordProblems
from lightning_modules.telepathy import normalizer
from lightning_modules.telepathy.bridges import PerceiverBridge, TokenBridge
from lightning_modules.telepathy.flaws import NOTES_SCALE
from lightning_modules.telepathy.normalizer import StatisticalNormalizer
from lightning_modules.telepathy.output_scale import OutputScale
from lightning_modules.telepathy.places import place_bias
from lightning_modules.telepathy.text_prefix import TextPrefix

SOURCE, TARGET = 12, 8
NORMALIZERS = ("statistical", "learned_statistical")
ENDS = SimpleNamespace(width=SOURCE), SimpleNamespace(width=TARGET)
BRIDGES = {
    "perceiver": lambda: PerceiverBridge(*ENDS, soft_tokens=5, depth=2, heads=2),
    "perceiver, wider": lambda: PerceiverBridge(*ENDS, soft_tokens=5, depth=1, heads=2, width=16),
    "perceiver, odd width": lambda: PerceiverBridge(*ENDS, soft_tokens=5, depth=1, heads=1, width=9),
    "perceiver, by fives": lambda: PerceiverBridge(*ENDS, soft_tokens=5, tokens_per_query=5, heads=2),
    "perceiver, no key_norm": lambda: PerceiverBridge(*ENDS, key_norm=False, soft_tokens=5, heads=2),
    "token": lambda: TokenBridge(*ENDS),
    "token, mlp": lambda: TokenBridge(*ENDS, tokens_per_source=3, hidden=16),
    "token, no key_norm": lambda: TokenBridge(*ENDS, key_norm=False, tokens_per_source=1),
}


@pytest.fixture(params=BRIDGES)
def bridge(request):
    torch.manual_seed(0)
    return BRIDGES[request.param]()


def states(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random states; padding has large values, so that a leak shows."""
    mask_BS = torch.tensor(lengths)[:, None] > torch.arange(max(lengths))
    states_BSC = torch.randn(len(lengths), max(lengths), SOURCE, generator=torch.Generator().manual_seed(1))
    return states_BSC.where(mask_BS[..., None], 100.0), mask_BS


def test_soft_tokens_and_their_mask(bridge):
    states_BSC, mask_BS = states([4, 7, 1])
    soft_BKD, mask_BK = bridge(states_BSC, mask_BS), bridge.soft_mask(mask_BS)
    each = getattr(bridge, "tokens_per_source", None)
    assert soft_BKD.shape == (3, 7 * each + 1 if each else 5, TARGET)
    assert (mask_BK.shape, mask_BK.dtype) == (soft_BKD.shape[:2], torch.bool)
    assert mask_BK.sum(1).tolist() == [4 * each + 1, 7 * each + 1, each + 1] if each else mask_BK[:, 0].all()


def test_queries_behind_the_question_send_nothing_but_in_the_notes():
    mask_BS = states([4, 7, 1])[1]
    sizes = {"soft_tokens": 10, "tokens_per_query": 2, "heads": 2, "span": 32}  # at positions 0, 6, 12, 19 and 25
    assert PerceiverBridge(*ENDS, **sizes).soft_mask(mask_BS).sum(1).tolist() == [2, 4, 2]
    assert PerceiverBridge(*ENDS, key_norm=False, **sizes).soft_mask(mask_BS).all()


def test_a_query_far_behind_the_question_has_scores_near_zero():
    mask_BS, place_K = states([4, 7])[1], torch.tensor([0, 5, 90])
    bias_BNKS = place_bias(place_K, mask_BS, slope=4.0, heads=2).unflatten(0, (2, 2))
    assert (bias_BNKS.amax(-1) == 0).all()
    for bias_NKS, length in zip(bias_BNKS, [4, 7], strict=True):
        distance_KS = (place_K[:, None] - torch.arange(length)).abs()
        torch.testing.assert_close(
            bias_NKS[..., :length].softmax(-1), (-4.0 * distance_KS).softmax(-1).expand(2, -1, -1)
        )
        assert (bias_NKS[..., length:] == -torch.inf).all()


def test_soft_tokens_do_not_depend_on_the_padding(bridge):
    bridge.eval()
    states_BSC, mask_BS = states([4, 7, 2])
    soft_BKD, mask_BK = bridge(states_BSC, mask_BS), bridge.soft_mask(mask_BS)
    for i, length in enumerate([4, 7, 2]):
        alone_BSC, only_BS = states_BSC[i : i + 1, :length], mask_BS[i : i + 1, :length]
        alone_KD = bridge(alone_BSC, only_BS)[0][bridge.soft_mask(only_BS)[0]]
        torch.testing.assert_close(soft_BKD[i][mask_BK[i]], alone_KD, atol=1e-5, rtol=1e-5)


def test_soft_tokens_depend_on_every_state_and_its_place(bridge, request):
    states_BSC, mask_BS = states([6])
    soft_BKD = bridge(states_BSC.requires_grad_(), mask_BS)
    (grad_BSC,) = torch.autograd.grad(soft_BKD.square().sum(), states_BSC)
    assert (grad_BSC.abs().sum(-1) > 0).all()
    turned_BKD = bridge(states_BSC.flip(1), mask_BS)
    blind = "perceiver, no key_norm" in request.node.name  # the notes had no positions
    assert torch.allclose(soft_BKD, turned_BKD, atol=1e-5) == blind


def test_every_parameter_is_trained(bridge):
    states_BSC, mask_BS = states([4, 7, 1])
    bridge(states_BSC, mask_BS).square().sum().backward()
    assert [n for n, p in bridge.named_parameters() if p.requires_grad and p.grad is None] == []


def test_soft_tokens_of_a_query_stand_side_by_side_and_read_its_place():
    states_BSC, mask_BS = states([6])
    bridge = PerceiverBridge(*ENDS, soft_tokens=12, tokens_per_query=2, depth=1, heads=2, span=6)
    other_BSC = states_BSC.clone()
    other_BSC[0, 3] *= -1
    moved_K = (bridge(other_BSC, mask_BS) - bridge(states_BSC, mask_BS))[0].norm(dim=-1)
    assert set(moved_K.topk(2).indices.tolist()) == {6, 7}
    assert moved_K[6:8].min() > 5 * moved_K[[*range(6), *range(8, 12)]].max()


@pytest.mark.parametrize(
    "bridge",
    [
        PerceiverBridge(*ENDS, soft_tokens=9, tokens_per_query=3, heads=2, hidden=10),
        TokenBridge(*ENDS, tokens_per_source=3),
        TokenBridge(*ENDS, tokens_per_source=3, hidden=10),
    ],
)
def test_the_soft_tokens_of_one_map_start_equal_and_learn_apart(bridge):
    states_BSC, mask_BS = states([3])
    soft_QRD = bridge(states_BSC, mask_BS)[0, :9].unflatten(0, (3, 3))
    assert torch.equal(soft_QRD, soft_QRD[:, :1].expand_as(soft_QRD))
    assert (soft_QRD[0] - soft_QRD[1]).abs().max() > 1e-4
    (soft_QRD * torch.randn(3, 3, TARGET)).sum().backward()
    torch.optim.SGD(bridge.parameters(), lr=0.1).step()
    soft_QRD = bridge(states_BSC, mask_BS)[0, :9].unflatten(0, (3, 3))
    assert (soft_QRD[:, 0] - soft_QRD[:, 1]).abs().max() > 0.01


@pytest.mark.parametrize(("make", "most"), [(PerceiverBridge, 1e-3), (TokenBridge, 0.02)])
def test_key_norm_makes_the_scale_of_the_states_irrelevant(make, most):
    states_BSC, mask_BS = states([4, 4])
    torch.manual_seed(0)
    bridge = make(*ENDS)
    for size in (0.1, 1e3):
        torch.testing.assert_close(bridge(states_BSC * size, mask_BS), bridge(states_BSC, mask_BS), atol=most, rtol=0)


@pytest.mark.parametrize(("key_norm", "size", "collapsed"), [(False, 0.003, True), (True, 1.0, False)])
def test_without_key_norm_states_of_embedding_scale_give_every_input_the_same(key_norm, size, collapsed):
    states_BSC, mask_BS = states([6, 6, 6, 6])
    torch.manual_seed(0)
    bridge = PerceiverBridge(*ENDS, key_norm=key_norm)
    soft_BKD = bridge(size * states_BSC, mask_BS) - bridge.out[-1].bias  # which is the same for every input
    spread = (soft_BKD.std(0).mean() / soft_BKD.square().mean().sqrt()).item()
    assert spread < 0.02 if collapsed else spread > 0.2


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (PerceiverBridge, {"soft_tokens": 0}, "model.bridge.soft_tokens must be at least 1, not 0"),
        (PerceiverBridge, {"depth": 0}, "model.bridge.depth must be at least 1, not 0"),
        (PerceiverBridge, {"soft_tokens": 5, "tokens_per_query": 2}, "5 soft tokens do not divide into 2 per query"),
        (PerceiverBridge, {"heads": 3}, "model.bridge: width 8 is not divisible by 3 heads"),
        (TokenBridge, {"tokens_per_source": 0}, "model.bridge.tokens_per_source must be at least 1, not 0"),
    ],
)
def test_sizes_that_make_no_bridge(make, options, message):
    with pytest.raises(ValueError, match=message):
        make(*ENDS, **options)


def test_the_output_scale():
    torch.manual_seed(0)
    soft_BKD, mask_BK = 7 * torch.randn(3, 5, TARGET), torch.rand(3, 5) < 0.7
    mask_BK[0, 0], mask_BK[0, 1] = True, False
    none_BKD, rms_BKD, tanh_BKD = (OutputScale(mode, 0.02)(soft_BKD, mask_BK) for mode in ("none", "rms", "tanh"))
    for scaled_BKD in (none_BKD, rms_BKD, tanh_BKD):
        assert (scaled_BKD[~mask_BK] == 0).all()
    torch.testing.assert_close(none_BKD[mask_BK], 0.02 * soft_BKD[mask_BK])
    torch.testing.assert_close(tanh_BKD[mask_BK], 0.02 * soft_BKD[mask_BK].tanh())
    rms_N = rms_BKD[mask_BK].square().mean(-1).sqrt()
    torch.testing.assert_close(rms_N, torch.full_like(rms_N, 0.02))
    cosine_N = torch.cosine_similarity(rms_BKD[mask_BK], soft_BKD[mask_BK], dim=-1)
    torch.testing.assert_close(cosine_N, torch.ones_like(cosine_N))


def test_the_output_scale_is_learned_and_stays_fp32():
    scale = OutputScale("rms", 0.5)
    soft_BKD = scale(torch.randn(2, 3, TARGET).bfloat16(), torch.ones(2, 3, dtype=torch.bool))
    soft_BKD.square().mean().backward()
    assert soft_BKD.dtype == torch.float32
    assert scale.scale.grad.item() == pytest.approx(2 * 0.5, rel=1e-4)  # mean square is scale²


def test_the_statistical_normalizer_is_numpys():
    values_NC = np.random.default_rng(0).normal(size=(50, SOURCE)) * np.arange(1, SOURCE + 1) + 3
    states_NC = torch.tensor(values_NC)
    made = StatisticalNormalizer(SOURCE, scale=0.1)
    made.calibrate(states_NC.sum(0), states_NC.square().sum(0), torch.full((SOURCE,), 50.0))
    wanted_NC = 0.1 * (values_NC - values_NC.mean(0)) / values_NC.std(0)
    np.testing.assert_allclose(made(states_NC.float()).numpy(), wanted_NC, atol=1e-5)
    assert set(made.state_dict()) == {"mean_C", "std_C"}
    assert not [*normalizer.make_normalizer("layer_norm", SOURCE).parameters()]


def test_statistics_are_of_all_ranks_and_exact_far_from_zero(monkeypatch):
    states_RNC = torch.randn(2, 40, SOURCE) + 1000
    states_RNC[..., 0] = 1000.0  # no feature is divided by nothing
    batches = [{"states": states_RNC[:1], "source_mask": torch.ones(1, 40, dtype=torch.bool)}]
    monkeypatch.setattr(normalizer, "held_out_batches", lambda *_: batches)
    monkeypatch.setattr(normalizer, "summed", lambda module, x: x + normalizer.sums([states_RNC[1]]))
    trainer = SimpleNamespace(ckpt_path=None, strategy=SimpleNamespace(batch_to_device=lambda batch: batch))
    made = StatisticalNormalizer(SOURCE)
    normalizer.calibrate(SimpleNamespace(trainer=trainer), made, lambda batch: batch["states"])
    values_NC = states_RNC.flatten(0, 1).double().numpy()
    np.testing.assert_allclose(made.mean_C, values_NC.mean(0), rtol=1e-6)
    np.testing.assert_allclose(made.std_C[1:], values_NC.std(0)[1:], rtol=1e-3)
    assert made(torch.full((SOURCE,), 1000.001))[0] < 2000


@pytest.mark.parametrize(("flaws", "scale"), [((), 1.0), (("key_scale",), NOTES_SCALE)])
def test_the_learned_normalizer_starts_as_the_fixed_one_and_trains(telepathy, fit, flaws, scale):
    fixed, learned = (telepathy(normalizer=kind, reproduce_flaws=list(flaws)) for kind in NORMALIZERS)
    fit(fixed, 1)
    assert [name for name, _ in fixed.normalizer.named_parameters()] == []
    fit(learned, 1, limit_train_batches=0)  # measures the statistics alone
    torch.testing.assert_close(learned.normalizer.std_C, fixed.normalizer.std_C)
    states_NC = fixed.normalizer.mean_C + fixed.normalizer.std_C * torch.randn(500, fixed.source.width)
    torch.testing.assert_close(learned.normalizer(states_NC), fixed.normalizer(states_NC))
    assert fixed.normalizer(states_NC).square().mean().sqrt().item() == pytest.approx(scale, rel=0.05)
    fit(learned, 2)
    for name, start in (("scale_C", scale), ("shift_C", 0.0)):
        assert (getattr(learned.normalizer, name) != start).float().mean() > 0.9
        assert f"normalizer.{name}" in learned.state_dict()


def test_the_normalizers_statistics_are_those_of_the_questions(telepathy, fit):
    module = telepathy(normalizer="statistical")
    data = WordProblems(batch_size=8, epoch_size=800, validation_size=20, eval_batch_size=7, test_sets={"test": 1})
    fit(module, 1, data)
    batch = module.collate(data.eval_problems["validation"], False)
    states_NC = module.read(batch)[batch["source_mask"]].numpy()
    np.testing.assert_allclose(module.normalizer.mean_C, states_NC.mean(0), atol=1e-5)
    np.testing.assert_allclose(module.normalizer.std_C, states_NC.std(0), rtol=1e-4)


def test_autocast_keeps_one_copy_of_the_source_states():
    bridge, kept = PerceiverBridge(*ENDS, soft_tokens=5, depth=3, heads=2), set()

    def keep(x: torch.Tensor) -> torch.Tensor:
        if x.dtype == torch.bfloat16 and x.shape[-1] == SOURCE and x.numel() == states_BSC.numel():
            kept.add(x.data_ptr())
        return x

    states_BSC, mask_BS = states([7, 4, 6])
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        soft_BKD = bridge(states_BSC, mask_BS)
    assert soft_BKD.requires_grad
    assert len(kept) == 1


def test_the_statistics_of_a_checkpoint_stay(telepathy, fit, tmp_path):
    trained = telepathy(normalizer="statistical")
    fit(trained, 1).save_checkpoint(tmp_path / "one.ckpt")
    resumed = telepathy(normalizer="statistical")
    trainer = Trainer(**QUIET | {"accelerator": "cpu", "limit_val_batches": 0, "max_steps": 2})
    other = WordProblems(**SMALL | {"validation_size": 8})
    trainer.fit(resumed, datamodule=other, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert torch.equal(resumed.normalizer.std_C, trained.normalizer.std_C)


def test_a_text_prefix_takes_no_random_number_from_the_bridge(telepathy):
    options = {"objectives": {"lm": 1.0, "reconstruction": 0.1}}
    alone, beside = telepathy(**options), telepathy(**options, text_prefix=4)
    after = torch.rand(())
    telepathy(**options)
    assert torch.rand(()) == after
    for name, value in alone.state_dict().items():
        assert torch.equal(value, beside.state_dict()[name]), name
    prefix_BKD = beside.text_prefix.vectors(3)
    assert prefix_BKD.shape == (3, 4, alone.target.width)
    assert prefix_BKD.square().mean().sqrt().item() == pytest.approx(alone.scale, rel=0.2)
    torch.manual_seed(1)
    assert not torch.equal(TextPrefix(4, alone.target.width, alone.scale).vectors(3), prefix_BKD)
