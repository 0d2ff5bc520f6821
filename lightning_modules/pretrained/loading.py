"""Language models and tokenizers from a folder, from the Hugging Face hub, or from a configuration alone."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from inspect import signature
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from datamodules.errors import UserError
from lightning_modules.core.attention import leave_out_cudnn_attention
from lightning_modules.pretrained.first_layers import FirstLayers, layer_stack, with_first_layers
from lightning_modules.pretrained.from_pretrained import load
from lightning_modules.pretrained.loading_device import loading_device
from lightning_modules.pretrained.norms import fuse_norms

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedConfig, PreTrainedTokenizerBase

    class CausalLM(nn.Module):
        """The part of a transformers model with an LM head that is used here; transformers has no such type."""

        config: PreTrainedConfig
        device: torch.device
        dtype: torch.dtype
        generation_config: GenerationConfig

        def generate(self, **options: Any) -> Any:
            """Return tokens_BT, or an output that has them."""

        def get_input_embeddings(self) -> nn.Embedding:
            """Return the embedding of input tokens."""

        def get_output_embeddings(self) -> nn.Module | None:
            """Return the LM head."""

        def num_parameters(self) -> int:
            """Return the number of parameters; tied parameters count once."""

        def save_pretrained(self, path: str) -> None:
            """Write the weights and the configuration to a folder."""


@dataclass
class Pretrained:
    """The model to load.

    Attributes:
        path: A folder made by `save_pretrained`, or a hub id.
        random_init: Build the model from its configuration with random weights, as a control or to test shapes. They
            are drawn on the device of the run.
        dtype: Precision of the weights. Frozen models may be `bfloat16`; trained models stay `float32`.
        tokenizer: Folder or hub id of the tokenizer, if it is not in `path`.
        attn_implementation: Implementation of attention in transformers, such as `sdpa`, `eager` or
            `flash_attention_2`; None for `sdpa` where the model has it.
        compile: Compile the model's layers, all by one graph. Generation runs without it.
        static_cache: Generate with keys and values in buffers of a fixed size, for which transformers compiles the
            model on a GPU. Rows that have ended then stay in the batch until all have.
    """

    path: str
    random_init: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    tokenizer: str | None = None
    attn_implementation: str | None = None
    compile: bool = False
    static_cache: bool = False

    def load_config(self) -> "PreTrainedConfig":
        """Load the model's configuration.

        Raises:
            UserError: There is no readable configuration at `path`.
        """
        from transformers import AutoConfig

        config: PreTrainedConfig = load(AutoConfig.from_pretrained, "a model configuration", self.path)
        return config

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer.

        Raises:
            UserError: There is no readable tokenizer.
        """
        from transformers import AutoTokenizer

        # In batches of few short texts, its threads cost more time than they save, and a forked worker warns of them
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        path = self.tokenizer or self.path
        tokenizer: PreTrainedTokenizerBase = load(AutoTokenizer.from_pretrained, "a tokenizer", path)
        return tokenizer

    def load_causal_lm(self) -> "CausalLM":
        """Load the whole model with its LM head.

        Raises:
            UserError: The model cannot be read, or its weights do not fit its configuration.
        """
        from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

        config = self.load_config()
        kind = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None) if self.random_init else AutoModelForCausalLM
        if kind is None:
            raise UserError(f"cannot load a model from '{self.path}': {config.model_type} is no causal language model")
        model: CausalLM = self._build(kind, config)
        return model

    def load_first_layers(self, layers: Sequence[int]) -> FirstLayers:
        """Load a model up to the last of `layers`; the layers after it and the LM head never take memory.

        Raises:
            UserError: The model has no such layer, is no language model, cannot be read, or its weights do not fit its
                configuration.
        """
        from transformers import MODEL_FOR_TEXT_ENCODING_MAPPING, MODEL_MAPPING

        config = self.load_config()
        encoders: Any = MODEL_FOR_TEXT_ENCODING_MAPPING if config.is_encoder_decoder else MODEL_MAPPING
        kind = encoders.get(type(config), None) or MODEL_MAPPING.get(type(config), None)
        text = config if kind is None else config.get_text_config()
        total: int | None = getattr(text, "num_hidden_layers", None)
        if kind is None or total is None or not hasattr(text, "vocab_size"):
            raise UserError(f"model.source: '{self.path}' ({config.model_type}) is no language model with layers")
        for layer in layers:
            if not 1 <= layer <= total:
                raise UserError(f"model.source_layer {layer} does not exist: '{self.path}' has layers 1 to {total}")
        kind = kind[0] if isinstance(kind, tuple) else kind
        # The pooler comes after all layers, and the checkpoints of masked language models lack it
        options = {"add_pooling_layer": False} if "add_pooling_layer" in signature(kind).parameters else {}
        error: Exception | None = None
        # Some architectures need all their layers, and then give the states themselves
        for loader, count in ((with_first_layers(kind, max(layers), total), total), (kind, None)):
            try:
                model = self._build(loader, config, **options)
                is_pair = config.is_encoder_decoder and type(config) not in encoders
                return FirstLayers(model.get_encoder() if is_pair else model, layers, count)
            except Exception as caught:  # of any class: every architecture has code of its own
                error = caught
        if isinstance(error, UserError):
            raise error
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"model.source: '{self.path}' ({config.model_type}) does not read text: {reason}") from error

    def _build(self, loader: Any, config: "PreTrainedConfig", **options: Any) -> Any:
        leave_out_cudnn_attention()
        what = "a model", self.path
        options |= {"dtype": {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]}
        if self.attn_implementation is not None:
            options["attn_implementation"] = self.attn_implementation
        if (device := loading_device()).type != "cpu":
            options["device_map"] = {"": device}
        # transformers only logs weights that do not fit; it has to return them, so that they can be an error here
        options |= {"config": config, "ignore_mismatched_sizes": True, "output_loading_info": True}
        if self.random_init:
            # Of no weights, all are missing: transformers makes them on the meta device, then draws them in place
            model, _ = load(lambda _, **named: loader.from_pretrained(None, **named), *what, **options, state_dict={})
        else:
            model, info = load(loader.from_pretrained, *what, **options, use_safetensors=True)
            wrong = sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
            if wrong:
                problem = f"{len(wrong)} parameters are missing or of another shape, first {wrong[0]}"
                raise UserError(f"the weights in '{self.path}' do not fit its config: {problem}")
        fuse_norms(model)
        if self.compile:
            self._compile(model, config)
        size, attention = f"{model.num_parameters() / 1e6:.3g} M parameters", model.config._attn_implementation
        rank_zero_info(f"{self.path}: {config.model_type}, {size}, {self.dtype}, attention {attention}")
        return model

    def _compile(self, model: nn.Module, config: "PreTrainedConfig") -> None:
        """Let `torch.compile` make one graph for all layers; that of a whole model would take minutes."""
        layers = layer_stack(model, config.get_text_config().num_hidden_layers)
        if layers is None:
            raise UserError(f"compile: '{self.path}' ({config.model_type}) has no single list of layers: leave it out")
        for layer in layers:
            layer.compile(dynamic=True)
