"""Attention: the formula, head by head, with and without the pattern in memory."""

import pytest
import torch
from torch.func import functional_call, vmap
from torch.nn.functional import scaled_dot_product_attention

from lightning_modules.separability.attention import Attention


@pytest.fixture
def attention() -> Attention:
    torch.manual_seed(0)
    return Attention(width=12, heads=3).double()


@pytest.mark.parametrize("hooked", [False, True], ids=["sdpa", "pattern"])
def test_attention_is_the_sum_over_heads_of_its_formula(attention, hooked):
    if hooked:
        attention.pattern.register_forward_hook(lambda module, args, output: None)
    x_TD = torch.randn(5, 12, dtype=torch.float64)
    expected_TD = torch.zeros_like(x_TD)
    for head in range(3):
        parts = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        q, k, v, o = (part()[head] for part in parts)
        for t in range(5):
            score_S = torch.stack([(q @ x_TD[t]) @ (k @ x_TD[s]) / 4**0.5 for s in range(t + 1)])
            for s, weight in enumerate(score_S.softmax(0)):
                expected_TD[t] += weight * (o @ (v @ x_TD[s]))
    torch.testing.assert_close(attention(x_TD[None])[0], expected_TD)


def test_gradients_do_not_depend_on_whether_somebody_looks_at_the_pattern(attention):
    x_BTD = torch.randn(2, 5, 12, dtype=torch.float64)
    gradients = []
    for _ in range(2):
        attention.zero_grad()
        attention(x_BTD).square().sum().backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in attention.named_parameters()})
        attention.pattern.register_forward_hook(lambda module, args, output: None)
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_the_pattern_is_made_only_while_somebody_looks(attention, monkeypatch):
    made = []
    monkeypatch.setattr(torch.Tensor, "softmax", lambda *args, **options: made.append(args) or torch.softmax(*args))
    x_BTD = torch.randn(1, 5, 12, dtype=torch.float64)
    attention(x_BTD)
    assert not made
    handle = attention.pattern.register_forward_hook(lambda module, args, output: None)
    attention(x_BTD)
    assert len(made) == 1
    handle.remove()
    attention(x_BTD)
    assert len(made) == 1


def test_a_hook_on_the_pattern_changes_the_reading(attention):
    x_BTD = torch.randn(1, 5, 12, dtype=torch.float64)
    attention.pattern.register_forward_hook(lambda module, args, output: torch.zeros_like(output))
    assert (attention(x_BTD) == 0).all()


def test_members_read_as_each_alone(attention):
    stacked = {name: torch.randn(4, *value.shape).double() for name, value in attention.named_parameters()}
    x_BTD = torch.randn(2, 5, 12, dtype=torch.float64)
    together = vmap(lambda parameters: functional_call(attention, parameters, (x_BTD,)))(stacked)
    for member in range(4):
        alone = functional_call(attention, {name: value[member] for name, value in stacked.items()}, (x_BTD,))
        torch.testing.assert_close(together[member], alone)


def test_every_head_has_parameters_of_its_own(attention):
    shapes = {name: tuple(value.shape) for name, value in attention.named_parameters()}
    for part, shape in {"q_proj": (4, 12), "k_proj": (4, 12), "v_proj": (4, 12), "o_proj": (12, 4)}.items():
        assert [shapes[f"{part}.{head}"] for head in range(3)] == [shape] * 3


def test_padded_heads_give_the_same_output():
    torch.manual_seed(0)
    attention = Attention(width=20, heads=2).double()  # heads of 10, padded to 16
    x_BTD = torch.randn(2, 12, 20, dtype=torch.float64)
    q_BHTK, k_BHTK, v_BHTK = attention._project(x_BTD, padded=True)
    assert q_BHTK.shape == (2, 2, 12, 16)
    read_BHTK = scaled_dot_product_attention(q_BHTK, k_BHTK, v_BHTK, is_causal=True, scale=attention.scale)
    torch.testing.assert_close(attention._write(read_BHTK, padded=True), attention(x_BTD))
