"""The tokens of a text: its bytes, its characters, or pairs of bytes that are merged by frequency."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import numpy as np
import numpy.typing as npt

from datamodules.batch import Integers

if TYPE_CHECKING:
    from tokenizers import Tokenizer

Level = Literal["byte", "char", "bpe"]
PIECE = 100_000  # characters per call of the tokenizer
UNKNOWN = "�"


class TextLevel(ABC):
    """A vocabulary of a text.

    Attributes:
        size: Number of tokens.
    """

    size: int

    @abstractmethod
    def encode(self, text: str | bytes) -> Integers:
        """Return the tokens of a text."""

    @abstractmethod
    def decode(self, tokens: Sequence[int]) -> str:
        """Return tokens as text."""

    def state(self) -> str:
        """Return what `restored` needs to make the same vocabulary."""
        return ""

    def lacks(self, text: str) -> list[str]:
        """Return the characters of a text that have no token."""
        return []


class Bytes(TextLevel):
    """256 bytes; invalid UTF-8 is decoded as U+FFFD."""

    size = 256

    def encode(self, text: str | bytes) -> Integers:
        """Return the bytes of a text."""
        return np.frombuffer(text.encode() if isinstance(text, str) else text, np.uint8)

    def decode(self, tokens: Sequence[int]) -> str:
        """Return bytes as text."""
        return bytes(tokens).decode(errors="replace")


class Characters(TextLevel):
    """Some characters, and one token for all others, the last one.

    Args:
        characters: The characters, in the order of their code points.
    """

    def __init__(self, characters: str):
        self.characters, self.size = characters, len(characters) + 1
        known = _codes(characters)
        # One look-up per character: a text of 100 million takes a second and no more memory than its tokens
        self._token_of = np.full(int(known.max(initial=0)) + 2, len(characters), np.int32)
        self._token_of[known] = np.arange(len(characters))

    @classmethod
    def of(cls, text: str) -> "Characters":
        """Return the vocabulary of the characters in a text."""
        return cls("".join(map(chr, np.unique(_codes(text)))))

    def encode(self, text: str | bytes) -> Integers:
        """Return the tokens of the characters."""
        assert isinstance(text, str)
        return self._token_of[np.minimum(_codes(text), len(self._token_of) - 1)]

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the characters of tokens."""
        characters = [*self.characters, UNKNOWN]
        return "".join(characters[token] for token in tokens)

    def state(self) -> str:
        """Return the characters."""
        return self.characters

    def lacks(self, text: str) -> list[str]:
        """Return the characters of a text that have no token."""
        return sorted(set(text) - set(self.characters))


class BytePairs(TextLevel):
    """A byte-level byte-pair encoding (Sennrich et al. 2016): frequent sequences of bytes are one token.

    Args:
        tokenizer: The trained tokenizer.
    """

    def __init__(self, tokenizer: "Tokenizer"):
        self.tokenizer, self.size = tokenizer, int(tokenizer.get_vocab_size())

    @classmethod
    def of(cls, text: str, size: int) -> "BytePairs":
        """Train a vocabulary of at most `size` tokens, of which 256 are the bytes."""
        from tokenizers import ByteLevelBPETokenizer, Tokenizer

        trained = ByteLevelBPETokenizer()
        trained.train_from_iterator(_pieces(text), vocab_size=size, show_progress=False)
        return cls(Tokenizer.from_str(trained.to_str()))

    def encode(self, text: str | bytes) -> Integers:
        """Return the tokens of a text."""
        assert isinstance(text, str)
        encoded = self.tokenizer.encode_batch(_pieces(text))
        return np.concatenate([np.array(piece.ids, np.int32) for piece in encoded])

    def decode(self, tokens: Sequence[int]) -> str:
        """Return tokens as text."""
        return str(self.tokenizer.decode(list(tokens)))

    def state(self) -> str:
        """Return the tokenizer as JSON."""
        return str(self.tokenizer.to_str())


def learned(level: Level, text: str | bytes, bpe_vocab: int) -> TextLevel:
    """Return the vocabulary of a training text; bytes need no text."""
    if level == "byte":
        return Bytes()
    assert isinstance(text, str)
    return Characters.of(text) if level == "char" else BytePairs.of(text, bpe_vocab)


def restored(level: Level, state: str) -> TextLevel:
    """Return the vocabulary whose `state` this is."""
    match level:
        case "byte":
            return Bytes()
        case "char":
            return Characters(state)
        case "bpe":
            from tokenizers import Tokenizer

            return BytePairs(Tokenizer.from_str(state))


def _codes(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _pieces(text: str) -> list[str]:
    return [text[start : start + PIECE] for start in range(0, max(len(text), 1), PIECE)]
