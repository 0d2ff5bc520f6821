"""Byte-level BPE tokenizers in the format of transformers."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from datamodules.errors import SIZE, UserError, check_numbers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPECIAL = ["<pad>", "<s>", "</s>"]
SMALLEST = len(SPECIAL) + 256


@runtime_checkable
class HasTexts(Protocol):
    """A datamodule with texts to train a tokenizer on."""

    def texts(self, count: int) -> list[str]:
        """Return the first `count` training texts, the same on every rank."""


@dataclass
class ByteLevelBPE:
    """The settings of a tokenizer that is trained on the texts of the data.

    Attributes:
        vocab_size: Number of tokens, special tokens included.
        single_digits: Make each digit a separate token, as Mistral does. Otherwise a whole number may be one token, as
            in Llama 3.
        texts: Number of training texts to learn the merges from.

    Raises:
        UserError: `vocab_size` has no room for all bytes and the special tokens, or a size is out of range.
    """

    vocab_size: int
    single_digits: bool
    texts: int = 50_000

    def __post_init__(self) -> None:
        check_numbers("model.tokenizer", SMALLEST, SIZE, vocab_size=self.vocab_size)
        check_numbers("model.tokenizer", 1, SIZE, texts=self.texts)

    def train_on(self, data: object) -> "PreTrainedTokenizerBase":
        """Learn the merges from the training texts of a datamodule.

        Raises:
            UserError: The data has no texts.
        """
        if not isinstance(data, HasTexts):
            raise UserError(f"model.tokenizer: {type(data).__name__} has no texts to train on; name a folder")
        return self.train(data.texts(self.texts))

    def train(self, texts: Iterable[str]) -> "PreTrainedTokenizerBase":
        """Learn the merges. `<pad>`, `<s>` and `</s>` are tokens 0, 1 and 2."""
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
        from transformers import PreTrainedTokenizerFast

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
        wrap: Callable[..., PreTrainedTokenizerBase] = PreTrainedTokenizerFast
        return wrap(
            tokenizer_object=tokenizer,
            pad_token=SPECIAL[0],
            bos_token=SPECIAL[1],
            eos_token=SPECIAL[2],
            clean_up_tokenization_spaces=False,
        )
