"""Language models and tokenizers from a folder, the hub, or a configuration alone."""

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from huggingface_hub.utils import logging as hub_logging
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from datamodules.errors import UserError


def quiet() -> None:
    """Keep bars and warnings of transformers off the terminal; what matters in them is raised here as an error."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()


@dataclass
class Pretrained:
    """Which model to load.

    Attributes:
        path: A folder made by `save_pretrained`, or a hub id.
        random_init: Build it from its configuration with random weights, a control and a way to test shapes.
        dtype: Precision of the weights; frozen models may be `bfloat16`, trained ones stay `float32`.
        tokenizer: Where the tokenizer is, if not in `path`.
    """

    path: str
    random_init: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    tokenizer: str | None = None

    def _load(self, loader: Any, what: str, path: str, **options: Any) -> Any:
        """Load with safe settings, and say in one sentence what is missing where."""
        quiet()
        if not os.path.isdir(path) and os.path.isdir(os.path.dirname(path)):
            raise UserError(f"cannot load {what} from '{path}': there is no such folder")
        try:
            return loader.from_pretrained(path, trust_remote_code=False, **options)
        except Exception as error:  # transformers, safetensors and tokenizers each raise kinds of their own
            if os.path.isdir(path):
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            else:
                reason = "it is no folder here, and the hub does not give it (private, misspelt, or no network?)"
            raise UserError(f"cannot load {what} from '{path}': {reason}") from error

    def load_config(self) -> Any:
        """Load the model's configuration."""
        return self._load(AutoConfig, "a model configuration", self.path)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer; one that cannot pad pads with its end token.

        Raises:
            UserError: It has no BOS or no EOS token, which training and generation both need.
        """
        path = self.tokenizer or self.path
        tokenizer = self._load(AutoTokenizer, "a tokenizer", path)
        for name in ("bos_token", "eos_token"):
            if getattr(tokenizer, name) is None:
                raise UserError(f"the tokenizer of '{path}' has no {name}: choose a model whose texts begin and end")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load_causal_lm(self) -> nn.Module:
        """Load the whole model with its LM head."""
        return self._build(AutoModelForCausalLM, self.load_config())

    def load_first_layers(self, layers: int) -> nn.Module:
        """Load the embedding and the first `layers` layers only; the rest and the LM head never take memory.

        The output is the residual stream after layer `layers`; after the last layer, the final norm belongs to it.

        Raises:
            UserError: The model has no such layer, or keeps its final norm elsewhere than models of Llama's kind.
        """
        config = self.load_config()
        total = config.num_hidden_layers
        if not 1 <= layers <= total:
            raise UserError(f"source_layer {layers} does not exist: '{self.path}' has layers 1 to {total}")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        model = self._build(AutoModel, config)
        if not hasattr(model, "norm"):
            raise UserError(f"'{self.path}' ({config.model_type}) has no final 'norm': choose a model of Llama's kind")
        if layers < total:
            model.norm = nn.Identity()
        return model

    def _build(self, loader: Any, config: Any) -> nn.Module:
        dtype = getattr(torch, self.dtype)
        if self.random_init:
            return loader.from_config(config, dtype=dtype, attn_implementation="sdpa")
        options = {"dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True}
        # Mismatches are let pass there and told here, since transformers tells them in its log only
        checks = {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = self._load(loader, "a model", self.path, config=config, **options, **checks)
        wrong = sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
        if wrong:
            told = f"{len(wrong)} parameters are missing or of another shape, first {wrong[0]}"
            raise UserError(f"the weights in '{self.path}' do not fit its config: {told}")
        return model
