"""The mixers compute their formulas, written out position by position, and keep nothing of a forward."""

import gc
import weakref

import pytest
import torch
from test_groundthink import make, rows
from torch import Tensor, nn
from torch.nn.functional import normalize, silu, softplus

from lightning_modules.mixers.convolution import ShortConvolution
from lightning_modules.mixers.gated_delta import GatedDelta
from lightning_modules.mixers.gates import RATES, Gates
from lightning_modules.mixers.key_bank import Bank
from lightning_modules.mixers.keys import KeyPlaces, hashed_keys
from lightning_modules.mixers.swiglu import SwiGLU

HEADS, KEY, VALUE, LENGTH = 2, 8, 4, 37


def convolved(conv: ShortConvolution, x_TC: Tensor) -> Tensor:
    """The sum of `ShortConvolution`, one earlier position after the other."""
    y_TC = torch.zeros_like(x_TC)
    for back, weight_C in enumerate(conv.weight[:, 0].unbind(1)[::-1]):
        y_TC[back:] += weight_C * x_TC[: len(x_TC) - back]
    return silu(y_TC)


def formula(mixer: GatedDelta, x_TD: Tensor, most_beta: float) -> Tensor:
    """The formula of `GatedDelta`."""
    q_THK, k_THK, v_THV = (
        convolved(getattr(mixer, f"{name}_conv"), getattr(mixer, f"{name}_proj")(x_TD)).unflatten(1, (HEADS, -1))
        for name in "qkv"
    )
    q_THK, k_THK = (x / (x.square().sum(2, keepdim=True) + 1e-6).sqrt() for x in (q_THK, k_THK))
    gates = mixer.gates
    g_TH = -gates.A_log.exp() * softplus(gates.a_proj(x_TD) + gates.dt_bias)
    beta_TH = most_beta * gates.b_proj(x_TD).sigmoid()
    state_HKV, reads = torch.zeros(HEADS, KEY, VALUE, dtype=x_TD.dtype), []
    for q_HK, k_HK, v_HV, g_H, beta_H in zip(q_THK, k_THK, v_THV, g_TH, beta_TH, strict=True):
        state_HKV = g_H.exp()[:, None, None] * state_HKV
        error_HV = v_HV - torch.einsum("hkv,hk->hv", state_HKV, k_HK)
        state_HKV = state_HKV + beta_H[:, None, None] * k_HK[..., None] * error_HV[:, None]
        reads.append(torch.einsum("hkv,hk->hv", state_HKV, q_HK) / KEY**0.5)
    read_THV = torch.stack(reads)
    read_THV = read_THV / (read_THV.square().mean(2, keepdim=True) + 1e-6).sqrt() * mixer.norm.weight
    return mixer.o_proj(read_THV.flatten(1) * silu(mixer.gate_proj(x_TD)))


@pytest.mark.parametrize(("negative", "most_beta"), [(False, 1.0), (True, 2.0)])
def test_the_delta_mixer_is_its_formula(negative, most_beta):
    mixer = GatedDelta(6, HEADS, KEY, VALUE, 3, 2, allow_negative_eigenvalues=negative).double()
    for parameter in (mixer.gates.A_log, mixer.gates.b_proj.bias, mixer.norm.weight):
        nn.init.normal_(parameter)
    x_BTD = torch.randn(2, LENGTH, 6, dtype=torch.float64)
    expected = torch.stack([formula(mixer, x_TD, most_beta) for x_TD in x_BTD])
    torch.testing.assert_close(mixer(x_BTD), expected)


def test_a_query_of_a_token_finds_its_key_from_the_start():
    mixer = GatedDelta(6, HEADS, KEY, VALUE)
    assert torch.equal(mixer.q_proj.weight, mixer.k_proj.weight)
    assert mixer.q_proj.weight is not mixer.k_proj.weight


def test_each_head_begins_with_a_rate_of_its_own_part_of_the_range():
    for _ in range(20):
        log_decay_BTH = Gates(6, 4, "spread", 1.0)(torch.zeros(1, 1, 6))[0]
        share_H = (-log_decay_BTH[0, 0] / RATES[0]).log() / torch.tensor(RATES[1] / RATES[0]).log()
        assert (share_H * 4 + 1e-4).floor().tolist() == [0, 1, 2, 3]


def test_keys_of_both_are_the_sum_of_two_unit_vectors():
    k_BTHK = 9 * torch.randn(2, 5, HEADS, KEY)
    _, keys_BTHK, _ = KeyPlaces("both", False, None)(k_BTHK, k_BTHK, 3, torch.zeros(2))
    expected = normalize(k_BTHK, dim=-1) + hashed_keys(torch.arange(3, 8), HEADS, KEY)
    torch.testing.assert_close(keys_BTHK, expected)


def test_a_learned_bank_is_the_cayley_transform():
    turn_HKK = torch.randn(HEADS, KEY, KEY, dtype=torch.float64)
    skew_HKK, one_KK = turn_HKK - turn_HKK.mT, torch.eye(KEY).double()
    torch.testing.assert_close(Bank.keys(turn_HKK), (one_KK + skew_HKK).inverse() @ (one_KK - skew_HKK))


def test_the_gate_of_swiglu_has_the_silu():
    mlp, x_ND = SwiGLU(6, 9), torch.randn(4, 6)
    torch.testing.assert_close(mlp(x_ND), mlp.down(silu(mlp.gate(x_ND)) * mlp.up(x_ND)))


def test_window_attention_keeps_nothing_of_the_state_after_a_forward():
    module, values = make("GSS", window_reads_state=True), []
    site = module.network.blocks[0].gated_delta.value
    hook = site.register_forward_hook(lambda module, args, output: values.append(weakref.ref(output)))
    with torch.no_grad():
        module(rows())
    hook.remove()
    gc.collect()
    assert values[0]() is None


def test_the_initial_weights_of_a_convolution_have_the_range_of_its_inputs():
    assert 0.49 < ShortConvolution(500, 4).weight.abs().max() <= 0.5
