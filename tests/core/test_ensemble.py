"""An ensemble is S ordinary networks: same outputs, same gradients, same hooks."""

from functools import partial

import pytest
import torch
from torch import nn

from lightning_modules.core.block import MLP
from lightning_modules.core.decoder import Decoder
from lightning_modules.core.ensemble import call_members, fit_state, member_call, member_state, observe, stack_members
from lightning_modules.core.ensemble_module import EnsembleModule
from lightning_modules.separability.attention import Attention

SEEDS = [5, 6, 7]
VOCAB, LENGTH, WIDTH = 11, 6, 8


def make() -> Decoder:
    return Decoder(VOCAB, WIDTH, [partial(Attention, WIDTH, heads=2)], partial(MLP, WIDTH, 32), positions=LENGTH)


def alone(seed: int) -> Decoder:
    torch.manual_seed(seed)
    return make()


@pytest.fixture
def stacked() -> nn.Module:
    return stack_members(make, SEEDS)


def test_members_begin_as_the_networks_of_their_seeds_do(stacked):
    for member, seed in enumerate(SEEDS):
        own = member_state(stacked.state_dict(), member)
        for name, value in alone(seed).state_dict().items():
            assert torch.equal(own[name], value), name


def test_stacking_leaves_the_random_state_alone():
    torch.manual_seed(1)
    expected = torch.rand(1)
    torch.manual_seed(1)
    stack_members(make, SEEDS)
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("shared", [False, True], ids=["own tokens", "shared tokens"])
def test_outputs_and_gradients_are_those_of_the_networks_alone(stacked, shared):
    tokens = torch.randint(11, (4, 6) if shared else (3, 4, 6))
    (logits_SBTV,) = call_members(stacked, 3, tokens)
    logits_SBTV.square().sum().backward()
    for member, seed in enumerate(SEEDS):
        network = alone(seed)
        logits_BTV = network(tokens if shared else tokens[member])
        torch.testing.assert_close(logits_SBTV[member], logits_BTV)
        logits_BTV.square().sum().backward()
        gradients = dict(stacked.named_parameters())
        for name, value in network.named_parameters():
            torch.testing.assert_close(gradients[name].grad[member], value.grad, rtol=1e-4, atol=1e-5)


def test_a_hook_knows_its_member_and_its_labels(stacked):
    scale_S = torch.tensor([1.0, 10.0, 100.0])
    labels_SBT = torch.randint(11, (3, 4, 6))

    def hook(module, args, output):
        call = member_call()
        return output * scale_S[call.index] + call.labels[..., None]

    stacked.final_norm.register_forward_hook(hook)
    tokens_BT = torch.randint(11, (4, 6))
    (logits_SBTV,) = call_members(stacked, 3, tokens_BT, labels_SBT)
    for member, seed in enumerate(SEEDS):
        network = alone(seed)
        network.final_norm.register_forward_hook(
            lambda module, args, output, member=member: output * scale_S[member] + labels_SBT[member, ..., None]
        )
        torch.testing.assert_close(logits_SBTV[member], network(tokens_BT))
    assert member_call() is None


def test_what_a_hook_observes_arrives_with_a_member_axis(stacked):
    seen = []
    stacked.final_residual.register_forward_hook(lambda module, args, output: observe(output, seen.append))
    tokens_BT = torch.randint(11, (4, 6))
    _, residual_SBTD = call_members(stacked, 3, tokens_BT, with_residual=True)
    assert torch.equal(seen[0], residual_SBTD)
    network = alone(5)
    network.final_residual.register_forward_hook(lambda module, args, output: observe(output, seen.append))
    network(tokens_BT)
    torch.testing.assert_close(seen[1], residual_SBTD[0])


def test_a_failing_call_leaves_no_trace(stacked):
    def hook(module, args, output):
        raise RuntimeError("on purpose")

    handle = stacked.final_norm.register_forward_hook(hook)
    with pytest.raises(RuntimeError, match="on purpose"):
        call_members(stacked, 3, torch.zeros(1, 6, dtype=torch.long))
    handle.remove()
    assert member_call() is None


def test_a_single_networks_state_is_given_to_every_member(stacked):
    fitted = fit_state(alone(9).state_dict(), stacked.state_dict(), 3, "a.ckpt")
    for name, value in alone(9).state_dict().items():
        assert all(torch.equal(own, value) for own in fitted[name])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: state.pop("unembed.weight"), "a.ckpt has no parameter unembed.weight"),
        (lambda state: state.update({"unembed.weight": torch.zeros(2, 2)}), r"unembed.weight is \(2, 2\) there"),
    ],
    ids=["missing", "another shape"],
)
def test_a_state_that_does_not_fit_is_refused_in_words(stacked, change, said):
    state = stacked.state_dict()
    change(state)
    with pytest.raises(ValueError, match=said):
        fit_state(state, stack_members(make, SEEDS).state_dict(), 3, "a.ckpt")


def test_gradients_are_clipped_by_the_norm_of_each_member_or_by_value(monkeypatch):
    module = EnsembleModule(make, SEEDS)
    norms_S = torch.tensor([0.1, 0.5, 8.0])
    directions = [torch.randn_like(parameter) for parameter in module.network.parameters()]
    length_S = torch.stack([x.flatten(1).square().sum(1) for x in directions]).sum(0).sqrt()
    for parameter, x in zip(module.network.parameters(), directions, strict=True):
        parameter.grad = x * (norms_S / length_S).view(-1, *[1] * (x.dim() - 1))
    module.configure_gradient_clipping(None, 0.5, "norm")
    clipped_S = torch.stack([x.grad.flatten(1).square().sum(1) for x in module.network.parameters()]).sum(0).sqrt()
    torch.testing.assert_close(clipped_S, torch.tensor([0.1, 0.5, 0.5]), rtol=1e-4, atol=0)
    calls = []
    monkeypatch.setattr(module, "clip_gradients", lambda *arguments: calls.append(arguments))
    module.configure_gradient_clipping(None, 0.5, "value")
    assert calls == [(None, 0.5, "value")]
