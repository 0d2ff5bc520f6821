"""RMS norms of transformers as one operator: the same numbers, gradients and names, and none where that is not so."""

from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.pretrained.norms import FusedNorm, fuse_norms

PAIR = Path(__file__).parents[2] / "assets" / "pair"


def fused(norm: nn.Module) -> nn.Module:
    model = nn.Sequential(norm)
    fuse_norms(model)
    return model[0]


@pytest.mark.parametrize("which", ["source", "target"])
def test_a_loaded_model_gives_the_same_logits_gradients_and_weights(which):
    plain = AutoModelForCausalLM.from_pretrained(PAIR / which)
    loaded = Pretrained(str(PAIR / which)).load_causal_lm()
    assert sum(isinstance(module, FusedNorm) for module in loaded.modules()) == 9  # two a layer, and the last
    assert plain.state_dict().keys() == loaded.state_dict().keys()
    found = []
    for model in (plain, loaded):
        x = model.get_input_embeddings()(torch.arange(3, 40)[None]).detach().requires_grad_()
        logits = model(inputs_embeds=x).logits
        found.append((logits, *torch.autograd.grad(logits.square().mean(), x)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


def test_the_weight_is_the_same_parameter():
    norm = LlamaRMSNorm(8)
    assert fused(norm).weight is norm.weight


@pytest.mark.parametrize("eps", [1e-6, 1e-5])
def test_eps_counts_where_the_input_is_small(eps):
    norm, x = LlamaRMSNorm(8, eps), 1e-4 * torch.randn(3, 8)
    torch.testing.assert_close(fused(norm)(x), norm(x))


def test_under_autocast_an_input_of_lower_precision_gives_fp32():
    norm, x = LlamaRMSNorm(8), torch.randn(3, 8).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        assert fused(norm)(x).dtype == norm(x).dtype == torch.float32


@pytest.mark.parametrize("norm", [GemmaRMSNorm(8), LlamaRMSNorm(8).bfloat16(), nn.LayerNorm(8)])
def test_other_norms_stay(norm):
    assert fused(norm) is norm


def test_a_norm_of_another_formula_stays():
    class ShiftedRMSNorm(LlamaRMSNorm):
        def forward(self, x):
            return super().forward(x) + x

    norm = ShiftedRMSNorm(8)
    assert fused(norm) is norm


def test_a_norm_that_adds_eps_elsewhere_stays():
    class OtherRMSNorm(LlamaRMSNorm):
        def forward(self, x):
            return self.weight * x / (x.square().mean(-1, keepdim=True).sqrt() + self.variance_epsilon)

    model = nn.Sequential(OtherRMSNorm(8, eps=1e-6), LlamaRMSNorm(8, eps=1e-6))
    fuse_norms(model)
    assert [isinstance(norm, FusedNorm) for norm in model] == [False, True]
