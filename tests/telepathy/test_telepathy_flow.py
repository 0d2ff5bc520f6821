"""The bridge that samples: its noise, its path, its sampling, and what it reads."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch

from lightning_modules.telepathy import FlowBridge
from lightning_modules.telepathy.noise import GOLDEN, gaussian, mixed, row_seeds, uniform

SOURCE, TARGET = 12, 8
ENDS = SimpleNamespace(width=SOURCE), SimpleNamespace(width=TARGET)
MADE = partial(FlowBridge, *ENDS, soft_tokens=10, span=8, width=16, hidden=16, heads=2, depth=2, steps=3)


def bridge_of(conditioning: str = "cross", **options) -> FlowBridge:
    """A bridge whose velocity is not 0, as it is at the start."""
    torch.manual_seed(0)
    bridge = MADE(conditioning=conditioning, **options)
    for name, parameter in bridge.named_parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1 if "weight" in name else 0.0)
    return bridge


def states(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    mask_BS = torch.tensor(lengths)[:, None] > torch.arange(max(lengths))
    states_BSC = torch.randn(len(lengths), max(lengths), SOURCE, generator=torch.Generator().manual_seed(1))
    return states_BSC.where(mask_BS[..., None], 100.0), mask_BS


def test_noise_is_standard_normal_and_belongs_to_its_row():
    seed_B = torch.arange(40)
    noise_BN = gaussian(seed_B, 5000)
    assert noise_BN.mean().abs() < 0.01
    assert noise_BN.std().item() == pytest.approx(1, abs=0.01)
    assert noise_BN.pow(4).mean().item() == pytest.approx(3, abs=0.1)
    assert torch.corrcoef(noise_BN).fill_diagonal_(0).abs().max() < 0.08
    assert torch.corrcoef(noise_BN[:, :30].T).fill_diagonal_(0).abs().max() < 0.8
    assert torch.equal(gaussian(seed_B[7:9], 5000), noise_BN[7:9])
    uniform_BN = uniform(seed_B, 5000)
    assert 0 < uniform_BN.min() < 1e-3
    assert 1 - 1e-3 < uniform_BN.max() < 1
    assert uniform_BN.mean().item() == pytest.approx(0.5, abs=0.005)


def test_noise_is_that_of_splitmix64_on_any_machine():
    first = [number % 2**64 for number in mixed(torch.arange(1, 4) * GOLDEN).tolist()]
    assert first == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]  # of the seed 0, as published
    start, golden = mixed(torch.tensor([5])).item(), GOLDEN % 2**64
    signed = [(start + place * golden + 2**63) % 2**64 - 2**63 for place in range(1, 7)]
    by_hand = [((number % 2**64 >> 40) + 0.5) / 2**24 for number in mixed(torch.tensor(signed)).tolist()]
    assert uniform(torch.tensor([5]), 6)[0].tolist() == pytest.approx(by_hand, rel=1e-6)
    pairs = zip(by_hand[:3], by_hand[3:], strict=True)
    normal = [math.sqrt(-2 * math.log(size)) * math.cos(2 * math.pi * angle) for size, angle in pairs]
    assert gaussian(torch.tensor([5]), 3)[0].tolist() == pytest.approx(normal, rel=1e-5)


def test_seeds_depend_on_the_tokens_and_their_order_but_not_on_the_padding():
    mask_BS = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    seeds = row_seeds(torch.tensor([[5, 6, 7, 0], [5, 7, 6, 0], [5, 6, 7, 9], [5, 6, 7, 0]]), mask_BS, drawn=False)
    assert seeds[0] == seeds[2]
    assert len(set(seeds.tolist())) == 3
    torch.manual_seed(1)
    first, second = (row_seeds(torch.tensor([[5, 6, 7]]), mask_BS[:1, :3], drawn=True) for _ in range(2))
    assert first != second


@torch.no_grad()
@pytest.mark.parametrize("conditioning", ["pooled", "cross", "hybrid"])
def test_samples_of_a_row_do_not_depend_on_its_batch(conditioning):
    bridge, seed_B = bridge_of(conditioning), torch.tensor([3, 11, 4])
    states_BSC, mask_BS = states([4, 7, 2])
    soft_BKD, mask_BK = bridge(states_BSC, mask_BS, seed_B), bridge.soft_mask(mask_BS)
    assert mask_BK.sum(1).tolist() == [5, 9, 3]
    for i, length in enumerate([4, 7, 2]):
        alone = states_BSC[i : i + 1, :length], mask_BS[i : i + 1, :length]
        alone_KD = bridge(*alone, seed_B[i : i + 1])[0][bridge.soft_mask(alone[1])[0]]
        torch.testing.assert_close(soft_BKD[i][mask_BK[i]], alone_KD, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(bridge(states_BSC, mask_BS, seed_B + 1), soft_BKD, atol=0.1)
    assert torch.equal(bridge(states_BSC, mask_BS), bridge(states_BSC, mask_BS, 0 * seed_B))


@pytest.mark.parametrize("conditioning", ["pooled", "cross", "hybrid"])
def test_samples_depend_on_every_state_and_every_trained_parameter_is_used(conditioning):
    bridge = bridge_of(conditioning)
    states_BSC, mask_BS = states([6])
    soft_BKD = bridge(states_BSC.requires_grad_(), mask_BS, torch.tensor([1]))
    soft_BKD.square().sum().backward()
    assert (states_BSC.grad.abs().sum(-1) > 0).all()
    assert [n for n, p in bridge.named_parameters() if p.requires_grad and p.grad is None] == []
    turned_BKD = bridge(states_BSC.flip(1), mask_BS, torch.tensor([1]))
    assert torch.allclose(soft_BKD, turned_BKD, atol=1e-4) == (conditioning == "pooled")  # a mean has no order
    assert bridge.pool.weight.requires_grad == (conditioning != "cross")
    assert bridge.memory.weight.requires_grad == (conditioning != "pooled")


def test_the_loss_is_the_error_of_the_velocity_on_a_straight_path(monkeypatch):
    bridge = bridge_of()
    read, seed_B = states([4, 7, 2]), torch.tensor([3, 11, 4])
    text_BQD, text_mask_BQ = torch.randn(3, 6, TARGET), torch.arange(6) < torch.tensor([[6], [5], [2]])
    seen = {}

    def velocity(x_BKD, time_B, *source):
        seen.update(x=x_BKD, time=time_B)
        return torch.full_like(x_BKD, 0.25)

    monkeypatch.setattr(bridge, "_velocity", velocity)
    loss = bridge.flow_loss(*read, seed_B, text_BQD, text_mask_BQ).item()
    noise_BKD = gaussian(seed_B, 10 * TARGET).view(3, 10, TARGET)
    by_hand = []
    for i, (text, places) in enumerate(((6, 5), (5, 9), (2, 3))):  # embeddings, and soft tokens within the question
        x1_QD, x0_QD, t = text_BQD[i], noise_BKD[i, :6], seen["time"][i]
        errors = [((0.25 - (x1_QD[k] - x0_QD[k])) ** 2).mean().item() for k in range(min(text, places))]
        by_hand.append(sum(errors) / len(errors))
        torch.testing.assert_close(seen["x"][i, 0], t * x1_QD[0] + (1 - t) * x0_QD[0])
        torch.testing.assert_close(seen["x"][i, text:], (1 - t) * noise_BKD[i, text:])  # behind the text
    assert loss == pytest.approx(sum(by_hand) / 3, rel=1e-5)
    torch.testing.assert_close(seen["time"], uniform(mixed(seed_B), 1)[:, 0] * 2 / 3)  # to that of the last step


def test_sampling_is_eulers_method(monkeypatch):
    bridge = bridge_of(steps=4)
    times = []

    def velocity(x_BKD, time_B, *source):
        times.append(time_B[0].item())
        return -x_BKD  # x' = -x: after n steps (1 - 1/n)^n of the start is left

    monkeypatch.setattr(bridge, "_velocity", velocity)
    soft_BKD = bridge(*states([3, 5]), torch.tensor([1, 2]))
    noise_BKD = gaussian(torch.tensor([1, 2]), 10 * TARGET).view(2, 10, TARGET)
    torch.testing.assert_close(soft_BKD, 0.75**4 * noise_BKD)
    assert times == [0, 0.25, 0.5, 0.75]


@torch.no_grad()
def test_layers_read_the_time_in_waves():
    bridge, seen = bridge_of(steps=4), []
    bridge.time.register_forward_pre_hook(lambda time, args: seen.append(args[0][0]))
    bridge(*states([3, 5]), torch.tensor([1, 2]))
    for step, wave_W in enumerate(seen):
        slow, fast = 0.1 * step / 4, math.exp(4) * step / 4  # the slowest and the fastest of the eight waves
        wanted = [math.sin(slow), math.sin(fast), math.cos(slow), math.cos(fast)]
        assert wave_W[[0, 7, 8, 15]].tolist() == pytest.approx(wanted, abs=1e-4)


def test_gradients_pass_through_the_last_step_alone(monkeypatch):
    bridge, slope = bridge_of(steps=4), torch.tensor(-1.0, requires_grad=True)
    monkeypatch.setattr(bridge, "_velocity", lambda x_BKD, *_: slope * x_BKD)
    bridge(*states([3, 5]), torch.tensor([1, 2])).sum().backward()
    noise = gaussian(torch.tensor([1, 2]), 10 * TARGET).sum().item()
    assert slope.grad.item() == pytest.approx(0.75**3 * noise / 4, rel=1e-4)


@torch.no_grad()
def test_a_query_makes_several_soft_tokens_of_one_source_position():
    bridge, (states_BSC, mask_BS) = bridge_of(tokens_per_query=2), states([4, 7, 2])
    assert bridge.positions().tolist() == [0, 0, 1, 1, 3, 3, 4, 4, 6, 6]
    assert torch.equal(*MADE(tokens_per_query=2).out[-1].weight.unflatten(0, (2, -1)))  # they start equal
    mask_BK = bridge.soft_mask(mask_BS)
    assert torch.equal(mask_BK, bridge.positions() < torch.tensor([[4], [7], [2]]))
    moved_BSC = states_BSC.clone()
    moved_BSC[:, 3] *= -1  # what the two soft tokens of the third query read above all
    seed_B = torch.tensor([3, 11, 4])
    change_K = (bridge(moved_BSC, mask_BS, seed_B) - bridge(states_BSC, mask_BS, seed_B))[1].norm(dim=-1)
    assert sorted(change_K.topk(2).indices.tolist()) == [4, 5]


@torch.no_grad()
def test_the_last_step_ends_at_the_output_but_in_the_notes():
    read, seed_B = states([8, 8]), torch.tensor([1, 2])
    for steps, key_norm in ((1, True), (4, True), (1, False)):
        bridge = bridge_of(steps=steps, key_norm=key_norm)
        assert isinstance(bridge.norm, torch.nn.LayerNorm) == key_norm
        bridge.out[-1].weight.zero_()
        bridge.out[-1].bias.fill_(0.5)
        soft_BKD, noise_BKD = bridge(*read, seed_B), gaussian(seed_B, 10 * TARGET).view(2, 10, TARGET)
        torch.testing.assert_close(soft_BKD, torch.full_like(soft_BKD, 0.5) if key_norm else noise_BKD + 0.5)
        assert bridge.soft_mask(read[1]).all()
    assert bridge.soft_mask(states([1])[1]).all()


def test_it_learns_to_sample_what_it_is_shown():
    torch.manual_seed(0)
    bridge, read = MADE(steps=8, width=32, hidden=64), states([8] * 16)
    text_BQD = read[0][:, :, :TARGET].repeat_interleave(2, dim=1)[:, :10]  # what stands at the place in the source
    mask_BQ = torch.ones(16, 10, dtype=torch.bool)
    optimizer = torch.optim.Adam(bridge.parameters(), lr=5e-3)
    for step in range(150):
        loss = bridge.flow_loss(*read, torch.arange(16) + 1000 * step, text_BQD, mask_BQ)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        sampled_BKD = bridge(*read, torch.arange(16))
    cosine_BBK = torch.cosine_similarity(sampled_BKD[:, None], text_BQD[None], dim=-1)
    assert cosine_BBK.mean(-1).argmax(1).tolist() == list(range(16))


def test_evaluation_draws_the_same_noise_and_training_does_not(telepathy, problems):
    module = telepathy(partial(FlowBridge, width=16, heads=2, steps=2))
    batch = module.collate(problems[:4], True)
    module.train()
    assert not torch.equal(module(batch), module(batch))
    module.eval()
    whole_BKD = module(batch)
    assert torch.equal(whole_BKD, module(batch))
    longest = int(batch["soft_mask"][2].sum())
    alone_BKD = module(module.collate(problems[2:3], True))
    torch.testing.assert_close(whole_BKD[2, :longest], alone_BKD[0, :longest], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 0}, "model.bridge.steps must be at least 1, not 0"),
        ({"heads": 0}, "model.bridge.heads must be at least 1, not 0"),
        ({"tokens_per_query": 3}, "model.bridge: 10 soft tokens do not divide into 3 per query"),
        ({"width": 15}, "model.bridge: width 15 is odd or not divisible by 2 heads"),
    ],
)
def test_sizes_that_make_no_bridge(options, message):
    with pytest.raises(ValueError, match=message):
        MADE(**options)
    assert MADE(hidden=None).out[1].out_features == 64  # four times the width


def test_a_number_that_is_drawn_for_a_step_is_the_same_for_all_rows():
    tokens_BS, mask_BS = torch.tensor([[3, 4, 5]] * 2), torch.ones(2, 3, dtype=torch.bool)
    first, second = row_seeds(tokens_BS, mask_BS, drawn=True)
    assert first == second != row_seeds(tokens_BS, mask_BS, drawn=True)[0]
