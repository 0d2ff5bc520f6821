"""Language models and tokenizers from a folder, from the Hugging Face hub, or from a configuration alone."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from datamodules.errors import UserError
from datamodules.hub import offline_without_hub, reason_of
from datamodules.sources import check_path

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    class CausalLM(nn.Module):
        """The part of a transformers model with an LM head that is used here; transformers has no such type."""

        base_model: nn.Module
        dtype: torch.dtype

        def generate(self, **options: Any) -> Tensor:
            """Return tokens_BT."""

        def get_input_embeddings(self) -> nn.Embedding:
            """Return the embedding of input tokens."""

        def get_output_embeddings(self) -> nn.Module:
            """Return the LM head."""

        def num_parameters(self) -> int:
            """Return the number of parameters; tied parameters count once."""

        def save_pretrained(self, path: str) -> None:
            """Write the weights and the configuration to a folder."""


def quiet() -> None:
    """Keep progress bars and warnings of transformers off the terminal; problems are raised as errors instead."""
    from huggingface_hub.utils.logging import set_verbosity_error as quiet_hub
    from transformers.utils import logging

    silence: list[Callable[[], None]] = [logging.set_verbosity_error, logging.disable_progress_bar, quiet_hub]
    for call in silence:
        call()


@dataclass
class Pretrained:
    """The model to load.

    Attributes:
        path: A folder made by `save_pretrained`, or a hub id.
        random_init: Build the model from its configuration with random weights, as a control or to test shapes.
        dtype: Precision of the weights. Frozen models may be `bfloat16`; trained models stay `float32`.
        tokenizer: Folder or hub id of the tokenizer, if it is not in `path`.
    """

    path: str
    random_init: bool = False
    dtype: Literal["float32", "bfloat16"] = "float32"
    tokenizer: str | None = None

    def load_config(self) -> "PreTrainedConfig":
        """Load the model's configuration.

        Raises:
            UserError: There is no readable configuration at `path`.
        """
        from transformers import AutoConfig

        config: PreTrainedConfig = _load(AutoConfig.from_pretrained, "a model configuration", self.path)
        return config

    def load_tokenizer(self) -> "PreTrainedTokenizerBase":
        """Load the tokenizer. A tokenizer without a padding token pads with its end token.

        Raises:
            UserError: There is no readable tokenizer, or it has no BOS or no EOS token. Training and generation need
                both tokens.
        """
        from transformers import AutoTokenizer

        path = self.tokenizer or self.path
        tokenizer: PreTrainedTokenizerBase = _load(AutoTokenizer.from_pretrained, "a tokenizer", path)
        for name, token in {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}.items():
            if token is None:
                raise UserError(f"the tokenizer of '{path}' has no {name}: choose a model whose texts begin and end")
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    def load_causal_lm(self) -> "CausalLM":
        """Load the whole model with its LM head.

        Raises:
            UserError: The model cannot be read, or its weights do not fit its configuration.
        """
        from transformers import AutoModelForCausalLM

        model: CausalLM = self._build(AutoModelForCausalLM, self.load_config())
        return model

    def load_first_layers(self, layers: int) -> "PreTrainedModel":
        """Load the embedding and the first `layers` layers; the other layers and the LM head never take memory.

        The model's output is the residual stream after layer `layers`. The final norm is applied only after the
        model's last layer.

        Raises:
            UserError: The model has no such layer, has no final norm under the name of Llama's kind of models, cannot
                be read, or its weights do not fit its configuration.
        """
        from transformers import AutoModel

        config = self.load_config()
        total: int = config.num_hidden_layers
        if not 1 <= layers <= total:
            raise UserError(f"model.source_layer {layers} does not exist: '{self.path}' has layers 1 to {total}")
        config.num_hidden_layers = layers
        if layer_types := getattr(config, "layer_types", None):  # only models that mix kinds of attention have it
            config.layer_types = layer_types[:layers]
        model: PreTrainedModel = self._build(AutoModel, config)
        if "norm" not in dict(model.named_children()):
            raise UserError(f"'{self.path}' ({config.model_type}) has no final 'norm': choose a model of Llama's kind")
        if layers < total:
            model.norm = nn.Identity()
        return model

    def _build(self, loader: Any, config: "PreTrainedConfig") -> Any:
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[self.dtype]
        if self.random_init:
            return loader.from_config(config, dtype=dtype, attn_implementation="sdpa")
        options = {"dtype": dtype, "attn_implementation": "sdpa", "use_safetensors": True}
        # transformers only logs weights that do not fit; it has to return them, so that they can be an error here
        options |= {"ignore_mismatched_sizes": True, "output_loading_info": True}
        model, info = _load(loader.from_pretrained, "a model", self.path, config=config, **options)
        wrong = sorted([*info["missing_keys"], *(name for name, *_ in info["mismatched_keys"])])
        if wrong:
            problem = f"{len(wrong)} parameters are missing or of another shape, first {wrong[0]}"
            raise UserError(f"the weights in '{self.path}' do not fit its config: {problem}")
        return model


def _load(from_pretrained: Callable[..., Any], what: str, path: str, **options: Any) -> Any:
    """Call a `from_pretrained` with safe settings.

    Raises:
        UserError: It fails; the sentence says what is missing and where.
    """
    quiet()
    where = f"cannot load {what} from '{path}'"
    check_path(path, where)
    if os.path.isfile(path):
        raise UserError(f"{where}: it is a file, name the folder that save_pretrained wrote")
    if os.path.isdir(path):
        context: AbstractContextManager[None] = nullcontext()
    elif os.path.isdir(os.path.dirname(path)) or path.count("/") > 1 or path.startswith((".", "/")):
        raise UserError(f"{where}: there is no such folder")
    else:
        context = offline_without_hub()
    try:
        with context:
            return from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # transformers, safetensors and tokenizers have no common class of errors
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        if not os.path.isdir(path):
            reason = f"there is no such folder, and {reason_of(error, path) or reason}"
        raise UserError(f"{where}: {reason}") from error
