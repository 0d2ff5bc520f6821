"""Batched greedy generation by transformers.

Shapes: B batch, T positions, K vectors, D model width, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_modules.pretrained.answers import Answer, answers_of, have_ended, written
from lightning_modules.pretrained.causal_lm import Sites, embedding_of, inserted, vocabulary
from lightning_modules.pretrained.decoding import decode, rows_can_leave
from lightning_modules.pretrained.positions import first_position
from lightning_modules.pretrained.sharding import is_sharded

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_modules.pretrained.loading import CausalLM

ROUND = 64  # positions: static caches have a multiple of these, so that few lengths have to be compiled
_reads_padding: "WeakKeyDictionary[CausalLM, bool]" = WeakKeyDictionary()  # what is known of each model
_gives_cache: "WeakKeyDictionary[CausalLM, bool]" = WeakKeyDictionary()


def end_tokens(model: "CausalLM", tokenizer: "PreTrainedTokenizerBase") -> list[int]:
    """Return all tokens that end a text: the tokenizer's EOS, and those of the model's `generation_config`."""
    known = model.generation_config.eos_token_id
    ends = [tokenizer.eos_token_id, *(known if isinstance(known, list) else [known])]
    return sorted({end for end in ends if end is not None})


def filler_token(model: "CausalLM", tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return a token for places where no token is read: the padding token if the model has it, else an end token.

    To models that do not count padding as positions (see `first_position`), it is an end token.
    """
    padding = None if first_position(model) is not None else tokenizer.pad_token_id
    known = [padding, *end_tokens(model, tokenizer), 0]
    return next(token for token in known if token is not None and 0 <= token < vocabulary(model))


@torch.no_grad()
def generate(
    model: "CausalLM",
    tokenizer: "PreTrainedTokenizerBase",
    prompts: Sequence[Sequence[int]],
    limit: int,
    stop: str | None = None,
    vectors_BKD: Tensor | None = None,
    columns: Sequence[Sequence[int]] | None = None,
    sites: Sites | None = None,
    static_cache: bool = False,
) -> list[Answer]:
    """Continue each prompt greedily: with the token of the largest logit, whatever else the model's settings ask for.

    Args:
        model: A causal language model.
        tokenizer: Its tokenizer.
        prompts: The tokens of each prompt, with the BOS token where training used one.
        limit: Largest number of new tokens.
        stop: A text that ends an answer.
        vectors_BKD: Vectors in the place of some tokens, see `lightning_modules.pretrained.causal_lm.inserted`.
        columns: For each token of each prompt the vector that takes its place, -1 for none.
        sites: Where vectors go in; None for the embedding.
        static_cache: Keep keys and values in buffers of a fixed size, see `Pretrained`.
    """
    columns = columns or [[-1] * len(prompt) for prompt in prompts]
    lengths = [len(prompt) for prompt in prompts]
    if len({*lengths}) > 1 and reads_padding(model, tokenizer):
        answers: dict[int, Answer] = {}
        for length in {*lengths}:
            rows = [row for row, own in enumerate(lengths) if own == length]
            some = None if vectors_BKD is None else vectors_BKD[rows]
            parts = [prompts[row] for row in rows], limit, stop, some, [columns[row] for row in rows]
            answers |= zip(rows, generate(model, tokenizer, *parts, sites, static_cache), strict=True)
        return [answers[row] for row in range(len(prompts))]
    ends, filler, stop = end_tokens(model, tokenizer), filler_token(model, tokenizer), written(tokenizer, stop)
    tokens_BT, mask_BT = _padded(prompts, filler, model.device)
    column_BT, _ = _padded(columns, -1, model.device)
    has_ended = partial(have_ended, tokenizer, ends, stop)
    # The processes that share a sharded model have to call it equally often
    drops = not (static_cache or is_sharded(model)) and gives_cache(model, tokenizer)
    positions = -(-(tokens_BT.shape[1] + limit) // ROUND) * ROUND if static_cache else None
    vectors = inserted(sites or embedding_of(model), vectors_BKD, column_BT)
    with _greedy(model, ends, filler, positions) as settings, vectors:
        made = decode(model, tokens_BT, mask_BT, settings, limit, has_ended, drops)
    return answers_of(tokenizer, made, ends, stop, limit)


@torch.no_grad()
def reads_padding(model: "CausalLM", tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether padding on the left changes what a model generates, in spite of the attention mask.

    It does where a state runs over all tokens, or where learned positions count the padding.
    """
    if model not in _reads_padding:
        filler, tokens = filler_token(model, tokenizer), [[1, 2, 3], [0, 1, 2, 3, 4, 5, 6]]
        rows = [[token % vocabulary(model) for token in row] for row in tokens]
        exact = torch.autocast(model.device.type, enabled=False)
        with _greedy(model, [], filler) as settings, exact:
            alone_1V, beside_2V = (
                model.generate(
                    input_ids=tokens_BT,
                    attention_mask=mask_BT,
                    generation_config=settings,
                    max_new_tokens=1,
                    output_logits=True,
                    return_dict_in_generate=True,
                ).logits[0]
                for tokens_BT, mask_BT in (_padded(rows[:1], 0, model.device), _padded(rows, filler, model.device))
            )
        rounding = torch.finfo(model.dtype).eps ** 0.5 * alone_1V.abs().max()
        _reads_padding[model] = bool(((alone_1V[0] - beside_2V[0]).abs() > rounding).any())
    return _reads_padding[model]


@torch.no_grad()
def gives_cache(model: "CausalLM", tokenizer: "PreTrainedTokenizerBase") -> bool:
    """Return whether rows can leave a batch of a model, see `rows_can_leave`."""
    if model not in _gives_cache:
        exact = torch.autocast(model.device.type, enabled=False)
        with _greedy(model, [], filler_token(model, tokenizer)) as settings, exact:
            _gives_cache[model] = rows_can_leave(model, settings)
    return _gives_cache[model]


def _padded(rows: Sequence[Sequence[int]], filler: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens_BT, padded on the left, and mask_BT, which is 1 at real tokens."""
    width = max(map(len, rows))
    tokens_BT = torch.tensor([[*[filler] * (width - len(row)), *row] for row in rows], dtype=torch.long, device=device)
    lengths_B = torch.tensor([len(row) for row in rows], device=device)
    return tokens_BT, (torch.arange(width, device=device) >= width - lengths_B[:, None]).long()


@contextmanager
def _greedy(model: "CausalLM", ends: list[int], filler: int, positions: int | None = None) -> Iterator[Any]:
    """Put the model's `generation_config` aside: its beams, penalties and samples would fill what a call leaves out.

    Args:
        model: The model.
        ends: The tokens that end a text.
        filler: The token behind the end of a row.
        positions: The length of a static cache; None for a cache that grows.
    """
    from transformers import GenerationConfig

    kept = model.generation_config
    make: Callable[..., GenerationConfig] = GenerationConfig
    cache = {} if positions is None else {"cache_implementation": "static", "max_cache_len": positions}
    settings = make(do_sample=False, num_beams=1, eos_token_id=ends or None, pad_token_id=filler, **cache)
    model.generation_config = settings
    try:
        # A growing cache would be compiled again and again
        with torch.compiler.set_stance("force_eager" if positions is None else "default"):
            yield settings
    finally:
        model.generation_config = kept
