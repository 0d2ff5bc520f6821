"""Greedy decoding of a batch by transformers, from which rows leave once they have ended.

Shapes: B batch, T positions, N new tokens.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_modules.pretrained.causal_lm import vocabulary
from lightning_modules.pretrained.sharding import is_sharded

if TYPE_CHECKING:
    from transformers import GenerationConfig

    from lightning_modules.pretrained.loading import CausalLM

LOOK = 8  # new tokens between two looks for rows that have ended
SHARE = 0.25  # share of the rows that has to have ended before they leave, since each time the cache is copied

HasEnded = Callable[[Tensor], Tensor]  # of the new tokens_BN of rows, True at rows that have ended


def decode(
    model: "CausalLM",
    tokens_BT: Tensor,
    mask_BT: Tensor,
    settings: "GenerationConfig",
    limit: int,
    has_ended: HasEnded,
    drops: bool,
) -> list[list[int]]:
    """Return the new tokens of each row; behind its end a row may have others.

    Args:
        model: The model.
        tokens_BT: The prompts, padded on the left.
        mask_BT: 1 at real tokens.
        settings: How to generate.
        limit: Largest number of new tokens.
        has_ended: Tells which rows have ended.
        drops: Let rows leave that have ended. The others go on with their part of the model's cache.
    """
    from transformers import StoppingCriteriaList

    width, rows = tokens_BT.shape[1], list(range(len(tokens_BT)))
    cache: dict[str, Any] = {}
    made: list[list[int]] = [[] for _ in rows]
    while rows:
        looks: list[Any] = [_Looks(width, has_ended, drops)]
        output: Any = model.generate(
            input_ids=tokens_BT,
            attention_mask=mask_BT,
            generation_config=settings,
            max_new_tokens=width + limit - tokens_BT.shape[1],
            stopping_criteria=StoppingCriteriaList(looks),
            return_dict_in_generate=True,
            synced_gpus=is_sharded(model),  # a process that is done waits for the others, whose layers it holds
            **cache,
        )
        mask_BT = nn.functional.pad(mask_BT, (0, output.sequences.shape[1] - tokens_BT.shape[1]), value=1)
        tokens_BT = output.sequences
        ended_B = has_ended(tokens_BT[:, width:]) | (tokens_BT.shape[1] >= width + limit)
        for row, tokens_T, ended in zip(rows, tokens_BT, ended_B.tolist(), strict=True):
            made[row] = tokens_T[width:].tolist() if ended else []
        stays_R = (~ended_B).nonzero()[:, 0]
        rows = [rows[index] for index in stays_R.tolist()]
        if rows:
            tokens_BT, mask_BT, cache = tokens_BT[stays_R], mask_BT[stays_R], cache_of(output)
            next(iter(cache.values())).reorder_cache(stays_R)
    return made


@torch.no_grad()
def rows_can_leave(model: "CausalLM", settings: "GenerationConfig") -> bool:
    """Return whether a row of a model goes on as before when another one leaves its batch.

    It does not where the cache is not one of transformers' own, or has a state that a second call of `generate` feeds
    with the whole row again (Mamba) or begins anew (RecurrentGemma).
    """

    def run(tokens_BT: Tensor, count: int, **cache: Any) -> Any:
        options = {"max_new_tokens": count, "output_logits": True, "return_dict_in_generate": True}
        mask_BT = torch.ones_like(tokens_BT)
        return model.generate(
            input_ids=tokens_BT, attention_mask=mask_BT, generation_config=settings, **options, **cache
        )

    tokens_BT = torch.arange(12, device=model.device).view(2, 6) % vocabulary(model)
    whole, part = run(tokens_BT, 3), run(tokens_BT, 2)
    try:
        cache = cache_of(part)
        (kept,) = cache.values()
        kept.reorder_cache(torch.tensor([1], device=model.device))
        is_read = kept.get_seq_length() == part.sequences.shape[1] - 1
        found_V = run(part.sequences[1:], 1, **cache).logits[0][0]
    except Exception:  # of any class: every architecture has code of its own
        return False
    expected_V = whole.logits[2][1]
    rounding = torch.finfo(model.dtype).eps ** 0.5 * expected_V.abs().max()
    return is_read and bool(((found_V - expected_V).abs() <= rounding).all())


def cache_of(output: Any) -> dict[str, Any]:
    """Return the cache of a call of `generate` as an argument of the next call, whose name has changed.

    It is empty for a model whose cache is not one of transformers' own, from which no row can be taken.
    """
    caches = {name: getattr(output, name, None) for name in ("cache", "past_key_values")}
    return next(({name: cache} for name, cache in caches.items() if hasattr(cache, "reorder_cache")), {})


class _Looks:
    """Tells transformers every few tokens which rows have ended, and ends the call once enough of them have."""

    def __init__(self, width: int, has_ended: HasEnded, drops: bool):
        self.width, self.has_ended, self.drops = width, has_ended, drops
        self.ended_B: Tensor | None = None

    def __call__(self, tokens_BT: Tensor, scores: Any, **options: Any) -> Tensor:
        """Return ended_B, True at rows that have ended, or at all rows to end the call."""
        if self.ended_B is None:
            self.ended_B = torch.zeros(len(tokens_BT), dtype=torch.bool, device=tokens_BT.device)
        if (tokens_BT.shape[1] - self.width) % LOOK == 0:
            self.ended_B = self.has_ended(tokens_BT[:, self.width :])
            if self.drops and self.ended_B.float().mean() >= SHARE:
                self.ended_B = torch.ones_like(self.ended_B)
        return self.ended_B
