"""Generation from networks that carry a state, one position at a time.

Models of the transformers library generate by `lightning_modules.pretrained.generation` instead.

Shapes: B batch, T prompt tokens, N new tokens, V vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.errors import UserError
from lightning_modules.core.contracts import StatefulNetwork

COLDEST = torch.finfo(torch.float32).tiny  # smaller temperatures than this are 0 in fp32, by which nothing is divided


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from the logits; greedy by default.

    Attributes:
        temperature: Divides the logits; 0 takes the most likely token (greedy).
        top_k: Sample among this many of the most likely tokens; None for all.
        top_p: Sample among the fewest most likely tokens whose probabilities add up to at least `top_p` (nucleus
            sampling, Holtzman et al. 2020); None for all.

    Raises:
        UserError: A number is out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature must be at least 0 and finite, not {self.temperature}")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k must be at least 1, not {self.top_k}")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be above 0 and at most 1, not {self.top_p}")

    def choose(self, logits_BV: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the next token of each row, token_B; `generator` is on the device of the logits.

        With a NaN among the logits of a row, as in a model that has diverged, each token is as likely as the others.
        """
        if self.temperature == 0:
            return logits_BV.argmax(1)
        logits_BV = logits_BV.float()
        logits_BV = (logits_BV - logits_BV.amax(1, keepdim=True)) / max(self.temperature, COLDEST)
        if self.top_k is not None:
            least_B1 = logits_BV.topk(min(self.top_k, logits_BV.shape[1]), dim=1).values[:, -1:]
            logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
        if self.top_p is not None:
            sorted_BV, order_BV = logits_BV.sort(dim=1, descending=True)
            p_BV = sorted_BV.softmax(1)
            sorted_BV = sorted_BV.masked_fill(p_BV.cumsum(1) - p_BV >= self.top_p, -torch.inf)
            logits_BV = torch.empty_like(logits_BV).scatter(1, order_BV, sorted_BV)
        # Weights of NaN would stop the program, on a GPU for good
        p_BV = logits_BV.softmax(1).nan_to_num(1.0)
        return torch.multinomial(p_BV, 1, generator=generator)[:, 0]


GREEDY = Sampling()


@torch.no_grad()  # inside the generator only: the caller keeps its mode
def stream_tokens(
    network: StatefulNetwork,
    prompt_BT: Tensor,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
) -> Iterator[Tensor]:
    """Read a prompt, then yield token_B after token_B.

    The memory is that of the network's state, and no token is read twice.

    Raises:
        UserError: The prompt is empty, or `max_new_tokens` is below 1.
    """
    if prompt_BT.shape[1] < 1:
        raise UserError("generation needs a prompt of at least one token")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens must be at least 1, not {max_new_tokens}")
    state, logits_BV = network.init_state(len(prompt_BT)), torch.empty(0)
    for token_B in prompt_BT.unbind(1):
        logits_BV, state = network.step(token_B, state)
    for index in range(max_new_tokens):
        token_B = sampling.choose(logits_BV, generator)
        yield token_B
        if index + 1 < max_new_tokens:
            logits_BV, state = network.step(token_B, state)


def generate(
    network: StatefulNetwork,
    prompt_BT: Tensor,
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return the new tokens_BN after a prompt; see `stream_tokens`."""
    return torch.stack(list(stream_tokens(network, prompt_BT, max_new_tokens, sampling, generator)), dim=1)
