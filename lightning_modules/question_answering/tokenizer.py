"""Byte-level BPE tokenizers in the form of transformers."""

from collections.abc import Iterable
from dataclasses import dataclass

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from datamodules.errors import UserError

SPECIAL = ["<pad>", "<s>", "</s>"]
SMALLEST = len(SPECIAL) + 256


@dataclass
class ByteLevelBPE:
    """A tokenizer to train.

    Attributes:
        vocab_size: Tokens, the special ones included.
        single_digits: Every digit a token of its own, as in Mistral; else a number may be one token, as in Llama 3.
        texts: How many training texts to learn the merges from.
    """

    vocab_size: int
    single_digits: bool
    texts: int = 50_000

    def __post_init__(self) -> None:
        if self.vocab_size < SMALLEST:
            raise UserError(
                f"tokenizer.vocab_size must be at least {SMALLEST}, all bytes and specials: {self.vocab_size}"
            )

    def train(self, texts: Iterable[str]) -> PreTrainedTokenizerFast:
        """Learn the merges; `<pad>`, `<s>` and `</s>` are tokens 0, 1 and 2."""
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [
                pre_tokenizers.Digits(individual_digits=self.single_digits),
                pre_tokenizers.ByteLevel(add_prefix_space=False),
            ]
        )
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=self.vocab_size, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
        )
        tokenizer.train_from_iterator(texts, trainer)
        return PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            pad_token=SPECIAL[0],
            bos_token=SPECIAL[1],
            eos_token=SPECIAL[2],
            clean_up_tokenization_spaces=False,
        )
