"""The decoder: exactly causal, and every part that one may intervene on has a name."""

import pytest
import torch

from lightning_modules.core.decoder import Attention, Decoder

SIZES = {"vocab_size": 17, "seq_len": 9, "width": 12, "depth": 2, "heads": 3}


@pytest.fixture(params=["layer", "none"])
def decoder(request) -> Decoder:
    torch.manual_seed(0)
    return Decoder(**SIZES, norm=request.param)


def test_a_logit_does_not_depend_on_any_later_token(decoder):
    tokens_BT = torch.randint(SIZES["vocab_size"], (2, SIZES["seq_len"]))
    embedded = []
    decoder.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    logits_BTV = decoder(tokens_BT)
    for position in range(SIZES["seq_len"]):
        # Squared, since the plain sum over the vocabulary might cancel
        gradient_BTD = torch.autograd.grad(logits_BTV[:, position].square().sum(), embedded, retain_graph=True)[0]
        assert (gradient_BTD[:, position + 1 :] == 0).all()
        assert (gradient_BTD[:, : position + 1] != 0).any(2).all()


def test_attention_is_the_sum_over_heads_that_it_says_it_is():
    torch.manual_seed(0)
    attention = Attention(seq_len=5, width=6, heads=2).double()
    x_TD = torch.randn(5, 6, dtype=torch.float64)
    expected_TD = torch.zeros_like(x_TD)
    for head in range(2):
        parts = (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj)
        q, k, v, o = (part()[head] for part in parts)
        for t in range(5):
            score_S = torch.stack([(q @ x_TD[t]) @ (k @ x_TD[s]) / 3**0.5 for s in range(t + 1)])
            for s, weight in enumerate(score_S.softmax(0)):
                expected_TD[t] += weight * (o @ (v @ x_TD[s]))
    torch.testing.assert_close(attention(x_TD[None])[0], expected_TD)


def test_the_sites_are_the_stream_where_their_names_say(decoder):
    seen = {}
    for name, module in decoder.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
    logits_BTV, residual_BTD = decoder(torch.randint(17, (2, 9)), with_residual=True)
    first = seen["embedding"]
    for block in ("blocks.0", "blocks.1"):
        middle = first + seen[f"{block}.attn"]
        torch.testing.assert_close(seen[f"{block}.mid_residual"], middle)
        first = seen[f"{block}.residual"]
        torch.testing.assert_close(first, middle + seen[f"{block}.mlp"])
        pattern_BHTT = seen[f"{block}.attn.pattern"]
        assert pattern_BHTT.shape == (2, 3, 9, 9)
        torch.testing.assert_close(pattern_BHTT.sum(3), torch.ones(2, 3, 9))
    assert residual_BTD is seen["final_residual"]
    torch.testing.assert_close(first, residual_BTD)
    torch.testing.assert_close(logits_BTV, decoder.unembed(seen["final_norm"]))


def test_every_head_has_parameters_of_its_own(decoder):
    shapes = {name: tuple(value.shape) for name, value in decoder.named_parameters()}
    for part, shape in {"q_proj": (4, 12), "k_proj": (4, 12), "v_proj": (4, 12), "o_proj": (12, 4)}.items():
        assert [shapes[f"blocks.1.attn.{part}.{head}"] for head in range(3)] == [shape] * 3
