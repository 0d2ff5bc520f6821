"""Batched greedy generation from embeddings.

Shapes: B batch, T positions, D model width.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lightning_modules.pretrained.loading import CausalLM


def left_pad(embeds_BTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's real positions to the right end and keep their order, wherever the padding was.

    Generation continues after the last column, so all padding has to be on the left.

    Returns:
        embeds_BTD and mask_BT, both reordered.
    """
    order_BT = mask_BT.long().argsort(dim=1, stable=True)
    return embeds_BTD.gather(1, order_BT[..., None].expand_as(embeds_BTD)), mask_BT.gather(1, order_BT)


@torch.no_grad()
def generate(
    model: "CausalLM", embeds_BTD: Tensor, mask_BT: Tensor, max_new_tokens: int, eos_token_id: int, pad_token_id: int
) -> list[list[int]]:
    """Continue each row greedily.

    Args:
        model: A causal language model.
        embeds_BTD: Input embeddings. They must begin with the BOS token where training used one.
        mask_BT: True at real positions.
        max_new_tokens: Maximum number of new tokens per row.
        eos_token_id: The token that ends a row.
        pad_token_id: The token that fills rows after their end.

    Returns:
        The new tokens of each row, without the end token and what follows it.
    """
    embeds_BTD, mask_BT = left_pad(embeds_BTD, mask_BT)
    tokens_BT: list[list[int]] = model.generate(
        inputs_embeds=embeds_BTD.to(model.dtype),
        attention_mask=mask_BT.long(),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    ).tolist()
    return [row[: row.index(eos_token_id)] if eos_token_id in row else row for row in tokens_BT]
