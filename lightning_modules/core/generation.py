"""Generation from networks that carry a state, one position at a time.

Networks of transformers generate by `lightning_modules.pretrained.generation` instead.

Shapes: B batch, T prompt tokens, N new tokens, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from datamodules.errors import UserError
from lightning_modules.core.contracts import StatefulNetwork


def sample_token(
    logits_BV: Tensor,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose the next token of each row.

    Args:
        logits_BV: Logits.
        temperature: Divides the logits; 0 takes the most likely token (greedy).
        top_k: Sample among this many of the most likely tokens.
        top_p: Sample among the fewest most likely tokens whose probabilities add up to at least `top_p` (nucleus
            sampling, Holtzman et al. 2020).
        generator: Random numbers, on the device of the logits.

    Returns:
        token_B.
    """
    if temperature == 0:
        return logits_BV.argmax(1)
    logits_BV = logits_BV.float() / temperature
    if top_k is not None:
        least_B1 = logits_BV.topk(min(top_k, logits_BV.shape[1]), dim=1).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if top_p is not None:
        sorted_BV, order_BV = logits_BV.sort(dim=1, descending=True)
        before_BV = sorted_BV.softmax(1).cumsum(1) - sorted_BV.softmax(1)
        sorted_BV = sorted_BV.masked_fill(before_BV >= top_p, -torch.inf)
        logits_BV = torch.empty_like(logits_BV).scatter(1, order_BV, sorted_BV)
    return torch.multinomial(logits_BV.softmax(1), 1, generator=generator)[:, 0]


def stream_tokens(
    network: StatefulNetwork,
    prompt_BT: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Read a prompt, then yield token_B after token_B.

    Memory per token is that of the network's state; nothing is read twice. The arguments are those of `sample_token`.

    Raises:
        UserError: The prompt is empty, or a number is out of range.
    """
    _check(prompt_BT.shape[1], max_new_tokens, temperature, top_k, top_p)
    with torch.no_grad():
        state, logits_BV = network.init_state(len(prompt_BT)), torch.empty(0)
        for token_B in prompt_BT.unbind(1):
            logits_BV, state = network.step(token_B, state)
        for index in range(max_new_tokens):
            token_B = sample_token(logits_BV, temperature, top_k, top_p, generator)
            yield token_B
            if index + 1 < max_new_tokens:
                logits_BV, state = network.step(token_B, state)


def generate(
    network: StatefulNetwork,
    prompt_BT: Tensor,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the new tokens_BN after a prompt; greedy by default. The arguments are those of `sample_token`."""
    tokens = stream_tokens(network, prompt_BT, max_new_tokens, temperature, top_k, top_p, generator)
    return torch.stack(list(tokens), dim=1)


def _check(prompt: int, max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    if prompt < 1:
        raise UserError("generation needs a prompt of at least one token")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    if not 0 <= temperature < float("inf"):
        raise UserError(f"temperature must be at least 0 and finite, not {temperature}")
    if top_k is not None and top_k < 1:
        raise UserError(f"top_k must be at least 1, not {top_k}")
    if top_p is not None and not 0 < top_p <= 1:
        raise UserError(f"top_p must be above 0 and at most 1, not {top_p}")
