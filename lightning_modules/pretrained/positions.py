"""The positions that a language model reads."""

from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from lightning_modules.pretrained.loading import CausalLM


def positions(model: "CausalLM | PreTrainedModel") -> int | None:
    """Return the largest number of positions of a row that a model reads; None without a limit."""
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is None or limit <= 0:  # -1 is written for no limit
        return None
    return limit - (first_position(model) or 0)


def first_position(model: "CausalLM | PreTrainedModel") -> int | None:
    """Return the first position of a row in models of RoBERTa's kind; None for others.

    These models count positions behind that of the padding, and so read fewer than their configuration says. They do
    not count tokens that are padding.
    """
    limit: int | None = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    for table in model.modules():
        is_table = isinstance(table, nn.Embedding) and table is not tokens and table.num_embeddings == limit
        if is_table and isinstance(table.padding_idx, int):
            return table.padding_idx + 1
    return None
