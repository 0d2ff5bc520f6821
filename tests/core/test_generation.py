"""Generation: greedy by default, sampled within its bounds, and one state per row."""

from functools import partial

import pytest
import torch

from datamodules.errors import UserError
from lightning_modules.core.block import MLP
from lightning_modules.core.decoder import Decoder
from lightning_modules.core.generation import Sampling, generate, stream_tokens
from lightning_modules.separability import Separability
from lightning_modules.separability.attention import Attention

LOGITS_BV = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log()


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder(11, 8, [partial(Attention, 8, 2)] * 2, partial(MLP, 8, 16), positions=20)


def drawn(**options) -> set[int]:
    random = torch.Generator().manual_seed(0)
    return {Sampling(**options).choose(LOGITS_BV, random).item() for _ in range(400)}


def test_greedy_tokens_are_those_that_whole_forwards_choose(decoder):
    prompt_BT = torch.randint(11, (3, 4))
    expected = prompt_BT
    for _ in range(6):
        expected = torch.cat([expected, decoder(expected)[:, -1:].argmax(2)], dim=1)
    assert torch.equal(generate(decoder, prompt_BT, 6), expected[:, 4:])


def test_a_stream_gives_the_same_tokens_one_by_one(decoder):
    prompt_BT = torch.randint(11, (2, 3))
    tokens = list(stream_tokens(decoder, prompt_BT, 5, Sampling(1.0), torch.Generator().manual_seed(1)))
    together = generate(decoder, prompt_BT, 5, Sampling(1.0), torch.Generator().manual_seed(1))
    assert torch.equal(torch.stack(tokens, 1), together)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"temperature": 0.0}, {0}),
        ({"temperature": 1.0}, {0, 1, 2, 3}),
        ({"temperature": 1.0, "top_k": 2}, {0, 1}),
        ({"temperature": 1.0, "top_k": 9}, {0, 1, 2, 3}),
        ({"temperature": 1.0, "top_p": 0.5}, {0}),
        ({"temperature": 1.0, "top_p": 0.51}, {0, 1}),
        ({"temperature": 1.0, "top_p": 1.0}, {0, 1, 2, 3}),
        ({"temperature": 0.05}, {0}),
        ({"temperature": 1e-320}, {0}),
    ],
    ids=str,
)
def test_sampling_draws_from_the_tokens_that_it_may(options, expected):
    assert drawn(**options) == expected


def test_logits_of_nan_are_no_error(decoder):
    logits_BV = torch.cat([LOGITS_BV, torch.full_like(LOGITS_BV, torch.nan)])
    tokens = torch.stack([Sampling(0.01).choose(logits_BV) for _ in range(200)])
    assert set(tokens[:, 0].tolist()) == {0}
    assert set(tokens[:, 1].tolist()) == {0, 1, 2, 3}
    torch.nn.init.constant_(decoder.unembed.weight, torch.nan)
    assert generate(decoder, torch.zeros(1, 2, dtype=torch.long), 3, Sampling(1.0, 4, 0.9)).shape == (1, 3)


def test_frequencies_are_the_probabilities():
    random = torch.Generator().manual_seed(0)
    tokens_B = Sampling(1.0).choose(LOGITS_BV.expand(40_000, -1), random)
    shares = torch.bincount(tokens_B, minlength=4) / 40_000
    torch.testing.assert_close(shares, LOGITS_BV[0].exp(), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"temperature": -1.0}, "temperature must be at least 0"),
        ({"temperature": float("nan")}, "temperature must be at least 0"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, "top_p must be above 0"),
    ],
    ids=str,
)
def test_numbers_out_of_range_are_refused_in_a_sentence(options, said):
    with pytest.raises(UserError, match=said):
        Sampling(**options)


def test_an_empty_prompt_and_no_new_tokens_are_refused_in_a_sentence(decoder):
    with pytest.raises(UserError, match="prompt of at least one token"):
        generate(decoder, torch.zeros(1, 0, dtype=torch.long), 3)
    with pytest.raises(UserError, match="max_new_tokens must be at least 1, not 0"):
        generate(decoder, torch.zeros(1, 1, dtype=torch.long), 0)


def test_a_module_generates_with_its_network_and_an_ensemble_does_not():
    sizes = {"vocab_size": 11, "seq_len": 8, "width": 8, "heads": 2}
    module = Separability(**sizes, seed=0)
    prompt_BT = torch.randint(11, (2, 3))
    assert torch.equal(module.generate(prompt_BT, 4), generate(module.network, prompt_BT, 4))
    with pytest.raises(UserError, match="needs a single network"):
        Separability(**sizes, ensemble=2).generate(prompt_BT, 4)


def test_the_caller_of_a_stream_keeps_its_gradients(decoder):
    stream = stream_tokens(decoder, torch.zeros(1, 1, dtype=torch.long), 3)
    next(stream)
    assert torch.is_grad_enabled()


def test_generation_refuses_hooks_that_expect_whole_rows(decoder):
    decoder.blocks[1].attn.register_forward_hook(lambda module, args, output: None)
    with pytest.raises(UserError, match=r"without the hook of a callback on blocks.1.attn"):
        generate(decoder, torch.zeros(1, 1, dtype=torch.long), 3)
