"""The decoder: exactly causal, every site has its name, and one step at a time gives the same logits."""

from functools import partial

import pytest
import torch
from torch import nn

from datamodules.errors import UserError
from lightning_modules.core.block import MLP
from lightning_modules.core.decoder import Decoder
from lightning_modules.separability.attention import Attention

VOCAB, LENGTH, WIDTH, HEADS = 17, 9, 12, 3


def make(norm: type[nn.Module] = nn.LayerNorm, positions: int | None = LENGTH, mlp: bool = True) -> Decoder:
    torch.manual_seed(0)
    mixers = [partial(Attention, WIDTH, HEADS)] * 2
    return Decoder(
        VOCAB, WIDTH, mlp=partial(MLP, WIDTH, 48) if mlp else None, mixers=mixers, norm=norm, positions=positions
    )


OPTIONS = {
    "layer": {},
    "no norm": {"norm": nn.Identity},
    "no positions": {"positions": None},
    "no mlp": {"mlp": False},
}


@pytest.fixture(params=OPTIONS.values(), ids=OPTIONS)
def decoder(request) -> Decoder:
    return make(**request.param)


@pytest.mark.parametrize("hooked", [False, True], ids=["sdpa", "pattern"])
def test_a_logit_does_not_depend_on_any_later_token(decoder, hooked):
    if hooked:
        for block in decoder.blocks:
            block.attn.pattern.register_forward_hook(lambda module, args, output: None)
    tokens_BT = torch.randint(VOCAB, (2, LENGTH))
    embedded = []
    decoder.embedding.register_forward_hook(lambda module, args, output: embedded.append(output))
    logits_BTV = decoder(tokens_BT)
    for position in range(LENGTH):
        # Squared, since the plain sum over the vocabulary might cancel
        gradient_BTD = torch.autograd.grad(logits_BTV[:, position].square().sum(), embedded, retain_graph=True)[0]
        assert (gradient_BTD[:, position + 1 :] == 0).all()
        assert (gradient_BTD[:, : position + 1] != 0).any(2).all()


def test_the_sites_are_the_stream_at_the_places_that_their_names_say():
    decoder, seen = make(), {}
    for name, module in decoder.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: seen.update({name: output}))
    logits_BTV, residual_BTD = decoder(torch.randint(VOCAB, (2, LENGTH)), with_residual=True)
    first = seen["embedding"]
    for block in ("blocks.0", "blocks.1"):
        middle = first + seen[f"{block}.attn"]
        torch.testing.assert_close(seen[f"{block}.mid_residual"], middle)
        first = seen[f"{block}.residual"]
        torch.testing.assert_close(first, middle + seen[f"{block}.mlp"])
        pattern_BHTT = seen[f"{block}.attn.pattern"]
        assert pattern_BHTT.shape == (2, HEADS, LENGTH, LENGTH)
        torch.testing.assert_close(pattern_BHTT.sum(3), torch.ones(2, HEADS, LENGTH))
    assert residual_BTD is seen["final_residual"]
    torch.testing.assert_close(first, residual_BTD)
    torch.testing.assert_close(logits_BTV, decoder.unembed(seen["final_norm"]))


def test_steps_give_the_logits_of_the_whole_row(decoder):
    tokens_BT = torch.randint(VOCAB, (2, LENGTH))
    state, rows = decoder.init_state(2), []
    for token_B in tokens_BT.unbind(1):
        logits_BV, state = decoder.step(token_B, state)
        rows.append(logits_BV)
    torch.testing.assert_close(torch.stack(rows, 1), decoder(tokens_BT), rtol=1e-5, atol=1e-5)


def test_a_step_past_the_last_position_is_refused_in_a_sentence():
    decoder = make(positions=1)
    _, state = decoder.step(torch.zeros(1, dtype=torch.long), decoder.init_state(1))
    with pytest.raises(UserError, match="positions for 1 tokens"):
        decoder.step(torch.zeros(1, dtype=torch.long), state)


def test_a_mixer_without_steps_is_refused_in_a_sentence():
    class Average(nn.Module):
        site = "average"

        def forward(self, x_BTD):
            return x_BTD.cumsum(1)

    decoder = Decoder(VOCAB, WIDTH, [Average], None)
    assert decoder(torch.zeros(1, 3, dtype=torch.long)).shape == (1, 3, VOCAB)
    assert "blocks.0.average" in dict(decoder.named_modules())
    with pytest.raises(UserError, match="the mixer Average cannot generate"):
        decoder.init_state(1)
