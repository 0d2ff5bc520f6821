"""The language model that training starts from: a pretrained one, or a new one from the fields of a configuration."""

from collections.abc import Mapping
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from datamodules.errors import UserError
from lightning_modules.core.attention import leave_out_cudnn_attention
from lightning_modules.pretrained.causal_lm import reads_ahead
from lightning_modules.pretrained.loading import Pretrained
from lightning_modules.question_answering.tokenizer import ByteLevelBPE

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lightning_modules.pretrained.loading import CausalLM

SPECIAL_FIELDS = ("pad_token_id", "bos_token_id", "eos_token_id")  # tokens 0, 1 and 2 of a new tokenizer


def start_model(
    pretrained: Pretrained | None, config: Mapping[str, Any] | None, tokenizer: ByteLevelBPE | str | None
) -> tuple["CausalLM", "PreTrainedTokenizerBase | None"]:
    """Return a causal language model in training mode, and its tokenizer if that is not one to train.

    Args:
        pretrained: The model to fine-tune, with its tokenizer. Alternative to `config`.
        config: Fields of the configuration of a new model. Its tokenizer sets vocabulary and special tokens.
        tokenizer: With `config`: the settings of a tokenizer to train, or a folder with a tokenizer.

    Raises:
        UserError: Both models are given or neither, a new one has no tokenizer, a pretrained one has another one, a
            model cannot be made, or it reads the tokens that it predicts.
    """
    if pretrained is not None and config is None:
        if tokenizer is not None:
            raise UserError("model.tokenizer is for model.config: use model.pretrained.tokenizer for another tokenizer")
        known = pretrained.load_tokenizer()
        return _trainable(pretrained.load_causal_lm(), f"model.pretrained: '{pretrained.path}'"), known
    if config is None or pretrained is not None:
        raise UserError("model needs either 'pretrained' or 'config', not both and not neither")
    if tokenizer is None:
        raise UserError("model.config needs model.tokenizer: a folder, or the size of a tokenizer to train")
    if isinstance(tokenizer, ByteLevelBPE):
        special = {name: index for index, name in enumerate(SPECIAL_FIELDS)}
        return new_model(config, tokenizer.vocab_size, special), None
    known = Pretrained(tokenizer).load_tokenizer()
    return new_model(config, len(known), {name: getattr(known, name) for name in SPECIAL_FIELDS}), known


def new_model(config: Mapping[str, Any], tokens: int, special: Mapping[str, Any]) -> "CausalLM":
    """Return a causal language model with random weights.

    Args:
        config: Fields of the configuration of transformers, `model_type` among them.
        tokens: Number of tokens of the tokenizer, the default of the field `vocab_size`.
        special: Fields of the special tokens; those in `config` come first.

    Raises:
        UserError: There is no such model type or field, or the fields do not fit each other.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM

    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        known = "one that transformers knows, such as llama or mistral"
        raise UserError(f"model.config.model_type must be {known}, not {kind!r}")
    if CONFIG_MAPPING[kind] not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(f"model.config.model_type {kind!r} is no causal language model, such as llama or mistral")
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
        return _trainable(loader.from_config(made, attn_implementation="sdpa"), f"model.config: {kind}")
    except UserError:
        raise
    except Exception as error:  # transformers has no class of errors for fields that do not fit each other
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"model.config makes no model: {reason}") from error


def _trainable(model: "CausalLM", name: str) -> "CausalLM":
    """Return a model in training mode, in which its dropout acts; transformers loads models in the other mode.

    Raises:
        UserError: It reads the tokens that it predicts; begins with `name`.
    """
    if reads_ahead(model.eval()):
        raise UserError(f"{name} reads the tokens that it predicts: choose a causal model")
    return model.train()
