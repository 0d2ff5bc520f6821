"""Batched greedy generation from embeddings.

Shapes: B batch, T positions, D model width.
"""

import torch
from torch import Tensor, nn


def left_pad(embeds_BTD: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Move each row's real positions to the right end, in order, whatever padding lies between them.

    Generation goes on from the last column, so padding has to come first.
    """
    order_BT = mask_BT.long().argsort(dim=1, stable=True)
    return embeds_BTD.gather(1, order_BT[..., None].expand_as(embeds_BTD)), mask_BT.gather(1, order_BT)


@torch.no_grad()
def generate(
    model: nn.Module, embeds_BTD: Tensor, mask_BT: Tensor, max_new_tokens: int, eos_token_id: int, pad_token_id: int
) -> list[list[int]]:
    """Continue each row greedily and return the new tokens of each, up to its end token.

    Args:
        model: A causal language model of transformers.
        embeds_BTD: Input embeddings, the BOS that training used included.
        mask_BT: Which positions are real.
        max_new_tokens: At most so many.
        eos_token_id: Where a row ends.
        pad_token_id: What fills rows that ended early.
    """
    embeds_BTD, mask_BT = left_pad(embeds_BTD, mask_BT)
    tokens_BT = model.generate(
        inputs_embeds=embeds_BTD.to(model.dtype),
        attention_mask=mask_BT.long(),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=eos_token_id,
        pad_token_id=pad_token_id,
    ).tolist()
    return [row[: row.index(eos_token_id)] if eos_token_id in row else row for row in tokens_BT]
