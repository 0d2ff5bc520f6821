"""Text from a sequence model, piece by piece.

Shapes: B batch, T prompt tokens, V vocabulary of the network, U vocabulary of the data.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_modules.core.contracts import StatefulNetwork
from lightning_modules.core.generation import GREEDY, Sampling, stream_tokens

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
LONGEST = 4  # bytes of a character in UTF-8


class Vocabulary:
    """A network that gives logits for the tokens of the data alone; a model may have more.

    Args:
        network: The network.
        size: U.
    """

    def __init__(self, network: StatefulNetwork, size: int):
        self.network, self.size = network, size

    def init_state(self, batch: int) -> Any:
        """Return the network's state before the first position."""
        return self.network.init_state(batch)

    def step(self, token_B: Tensor, state: Any) -> tuple[Tensor, Any]:
        """Return logits_BU at the next position, and the state after it."""
        logits_BV, state = self.network.step(token_B, state)
        return logits_BV[:, : self.size], state


def stream_text(
    network: StatefulNetwork,
    prompt_1T: Tensor,
    max_new_tokens: int,
    decode: Callable[[Sequence[int]], str],
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
) -> Iterator[str]:
    """Yield the continuation of a prompt in pieces; tokens that end within a character wait for the next token.

    Args:
        network: The network.
        prompt_1T: The prompt, one row.
        max_new_tokens: Tokens to add.
        decode: Gives tokens as text.
        sampling: How the next token is chosen.
        generator: Random numbers of the samples.

    Raises:
        UserError: See `stream_tokens`.
    """
    before, waiting = prompt_1T[0, -LONGEST:].tolist(), list[int]()  # a token's text may depend on the one before
    for token_B in stream_tokens(network, prompt_1T, max_new_tokens, sampling, generator):
        waiting.append(int(token_B))
        if done := _complete(before, waiting, decode):
            yield decode([*before, *waiting[:done]])[len(decode(before)) :]
            before, waiting = [*before, *waiting[:done]][-LONGEST:], waiting[done:]
    if waiting:
        yield decode([*before, *waiting])[len(decode(before)) :]


def _complete(before: list[int], waiting: list[int], decode: Callable[[Sequence[int]], str]) -> int:
    """Return how many of the tokens that wait no later token can change.

    A text that ends within a character ends with one replacement character. The tokens of this character are those
    without which the text lacks it and nothing else.
    """
    text = decode([*before, *waiting])
    if not text.endswith(REPLACEMENT):
        return len(waiting)
    prefixes = range(len(waiting) - 1, -1, -1)
    without = next((n for n in prefixes if decode([*before, *waiting[:n]]) == text[: -len(REPLACEMENT)]), 0)
    return without or (len(waiting) if len(waiting) > LONGEST else 0)
