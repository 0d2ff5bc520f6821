"""A pair of the true shapes of Llama 3.1 8B and Mistral 7B with random weights, for `full_size.py`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning_modules.pretrained.first_layers import FirstLayers
from lightning_modules.pretrained.loading import Pretrained

if TYPE_CHECKING:
    from lightning_modules.pretrained.loading import CausalLM

SIZES = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8}
TINY = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2}
SHAPES: dict[str, dict[str, Any]] = {  # as in the configurations of Llama-3.1-8B and of Mistral-7B-v0.3
    "source": {"vocab_size": 128256, "max_position_embeddings": 131072, "rope_theta": 500000.0},
    "target": {"vocab_size": 32768, "max_position_embeddings": 32768, "rope_theta": 1000000.0, "sliding_window": None},
}
SPECIAL = ["<s>", "</s>", "<unk>"]
VOCABULARY = SHAPES["target"]["vocab_size"]  # the most tokens of the tokenizer, which both models share
TEST = 64  # problems of the test file


@dataclass
class Kept(Pretrained):
    """A model that is loaded once, however often it is asked for.

    Attributes:
        kept: The model, once it is loaded.
    """

    kept: "CausalLM | FirstLayers | None" = None

    def load_causal_lm(self) -> "CausalLM":
        """Return the whole model."""
        if self.kept is None:
            self.kept = super().load_causal_lm()
        assert not isinstance(self.kept, FirstLayers)
        return self.kept

    def load_first_layers(self, layers: Sequence[int]) -> FirstLayers:
        """Return the first layers."""
        if self.kept is None:
            self.kept = super().load_first_layers(layers)
        assert isinstance(self.kept, FirstLayers)
        return self.kept


def write_pair(folder: Path, data: Path, layers: int, tiny: bool) -> int:
    """Write the configurations and the tokenizer of both models to a folder, and return the tokenizer's size.

    Args:
        folder: It gets the folders `source` and `target`.
        data: GSM8K's file of training problems, on which a byte-level BPE is trained.
        layers: Number of layers of both models.
        tiny: Use narrow layers.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import LlamaConfig, MistralConfig, PreTrainedTokenizerFast

    problems = [json.loads(line) for line in data.read_text().splitlines()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([f"{problem['question']}\n{problem['answer']}" for problem in problems], trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast: Any = PreTrainedTokenizerFast  # transformers has no types here
    tokenizer = fast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    kinds: dict[str, Any] = {"source": LlamaConfig, "target": MistralConfig}
    for name, kind in kinds.items():
        options = {**(TINY if tiny else SIZES), **SHAPES[name], "num_hidden_layers": layers}
        kind(**options, bos_token_id=0, eos_token_id=1, tie_word_embeddings=False).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return bpe.get_vocab_size()


def write_problems(folder: Path, data: Path, count: int) -> dict[str, str]:
    """Write the first `count` problems for training and some more for a test; return the settings of the data."""
    lines = data.read_text().splitlines()
    parts = {"path": lines[:count], "test_path": lines[count : count + TEST]}
    for name, some in parts.items():
        (folder / f"{name}.jsonl").write_text("\n".join(some) + "\n")
    return {name: str(folder / f"{name}.jsonl") for name in parts}
