"""A new language model from the fields of its configuration."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any, cast

from datamodules.errors import UserError
from lightning_modules.core.attention import leave_out_cudnn_attention

if TYPE_CHECKING:
    from lightning_modules.pretrained.loading import CausalLM


def new_model(config: Mapping[str, Any], tokens: int, special: Mapping[str, Any]) -> "CausalLM":
    """Return a causal language model with random weights.

    Args:
        config: Fields of the configuration of transformers, `model_type` among them.
        tokens: Number of tokens of the tokenizer, the default of the field `vocab_size`.
        special: Fields of the special tokens; those in `config` come first.

    Raises:
        UserError: There is no such model type or field, or the fields do not fit each other.
    """
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        known = "one that transformers knows, such as llama or mistral"
        raise UserError(f"model.config.model_type must be {known}, not {kind!r}")
    loader: Any = AutoModelForCausalLM
    leave_out_cudnn_attention()
    try:
        default, made = CONFIG_MAPPING[kind](), AutoConfig.for_model(**{**special, "vocab_size": tokens, **config})
        fields = {*vars(default), *made.attribute_map, "model_type"}
        for name in sorted(config.keys() - fields):  # transformers would keep it, without a use
            nearest = ", ".join(get_close_matches(name, fields, n=3, cutoff=0.0))
            raise UserError(f"model.config: {kind} has no '{name}'; the nearest names are: {nearest}")
        if made.vocab_size < tokens:
            raise UserError(f"model.config.vocab_size must be at least {tokens}, the tokens of the tokenizer")
        return cast("CausalLM", loader.from_config(made, attn_implementation="sdpa"))
    except UserError:
        raise
    except Exception as error:  # transformers has no class of errors for fields that do not fit each other
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"model.config makes no model: {reason}") from error
