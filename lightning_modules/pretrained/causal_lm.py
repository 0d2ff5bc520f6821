"""A causal language model called with vectors in the place of some tokens, for the logits of some positions.

Everything else is the model's own forward: the scale of its embeddings and of its logits, its caps, its masks.

Shapes: B batch, T positions, K vectors, D model width, N positions of the whole batch, V vocabulary.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from lightning_modules.pretrained.loading import CausalLM


@contextmanager
def inserted(model: "CausalLM", vectors_BKD: Tensor | None, column_BT: Tensor) -> Iterator[None]:
    """Replace outputs of the model's embedding by vectors, in the first call inside the block.

    The model still gets tokens, since some models look up more than their embedding, such as Gemma 4.

    Args:
        model: The model.
        vectors_BKD: The vectors, at the scale of the embedding's output; None to replace nothing.
        column_BT: For each position the vector k that goes there, -1 for a token.
    """
    if vectors_BKD is None:
        yield
        return

    def insert(module: nn.Module, args: Any, embeds_BTD: Tensor) -> Tensor:
        handle.remove()  # generation calls the embedding again for each new token
        at_BT1 = (column_BT >= 0)[..., None]
        index_BTD = column_BT.clamp_min(0)[..., None].expand_as(embeds_BTD)
        return torch.where(at_BT1, vectors_BKD.to(embeds_BTD.dtype).gather(1, index_BTD), embeds_BTD)

    handle = model.get_input_embeddings().register_forward_hook(insert)
    try:
        yield
    finally:
        handle.remove()


def logits_at(
    model: "CausalLM", tokens_BT: Tensor, predict_N: Tensor, vectors_BKD: Tensor | None, column_BT: Tensor
) -> Tensor:
    """Return the model's logits_NV at some positions; the LM head computes no others.

    Padding has to come last in a row, so that causal attention needs no mask.

    Args:
        model: The model.
        tokens_BT: The tokens.
        predict_N: Flat positions, row * T + column.
        vectors_BKD: Vectors in the place of tokens, see `inserted`.
        column_BT: The places of the vectors.
    """
    selected = False

    def select(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        nonlocal selected
        selected = True
        return args[0].flatten(0, -2)[predict_N][None], *args[1:]

    head = model.get_output_embeddings()
    handle = head.register_forward_pre_hook(select) if head is not None else None
    try:
        with inserted(model, vectors_BKD, column_BT):
            logits: Tensor = model(input_ids=tokens_BT, use_cache=False).logits
    finally:
        if handle is not None:
            handle.remove()
    return logits.flatten(0, -2) if selected else logits.flatten(0, -2)[predict_N]
