"""Language models and tokenizers from a folder, the hub, or a configuration alone."""

import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging


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
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            return loader.from_pretrained(path, trust_remote_code=False, **options)
        except (OSError, ValueError) as error:
            if os.path.isdir(path):
                reason = str(error).strip().splitlines()[0]
            else:
                reason = "it is no folder here, and the hub does not give it (private, misspelt, or no network?)"
            raise ValueError(f"cannot load {what} from '{path}': {reason}") from error

    def load_config(self) -> Any:
        """Load the model's configuration."""
        return self._load(AutoConfig, "a model configuration", self.path)

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """Load the tokenizer; one that cannot pad pads with its end token.

        Raises:
            ValueError: It has no BOS or no EOS token, which training and generation both need.
        """
        path = self.tokenizer or self.path
        tokenizer = self._load(AutoTokenizer, "a tokenizer", path)
        for name in ("bos_token", "eos_token"):
            if getattr(tokenizer, name) is None:
                raise ValueError(f"the tokenizer of '{path}' has no {name}: choose a model that marks where text begins")
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
            ValueError: The model has fewer layers.
        """
        config = self.load_config()
        total = config.num_hidden_layers
        if not 1 <= layers <= total:
            raise ValueError(f"source_layer {layers} does not exist: '{self.path}' has layers 1 to {total}")
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        model = self._build(AutoModel, config)
        if layers < total:
            model.norm = nn.Identity()
        return model

    def _build(self, loader: Any, config: Any) -> nn.Module:
        dtype = getattr(torch, self.dtype)
        if self.random_init:
            return loader.from_config(config, dtype=dtype, attn_implementation="sdpa")
        options = {"dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True}
        return self._load(loader, "a model", self.path, config=config, **options)
