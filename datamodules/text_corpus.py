"""The next token of running text: bytes, characters or pieces of words.

Shapes: B rows, T positions, U = T + 1 tokens of a window.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np

from datamodules.errors import UserError
from datamodules.sequence_task import SequenceTask, Split, label_next

HELD_OUT_SHARE = 20  # one part in 20 is the test text, another one before it the validation text
PIECE = 100_000  # characters that the tokenizer is given at a time
UNKNOWN = "�"


class TextCorpus(SequenceTask):
    """Windows of a text, each token with the next one as its label.

    The last 5 % of the text are for testing, and the 5 % before for validation. Training rows begin anywhere in the
    rest; held-out rows are windows that do not overlap, spread evenly, as many as asked for or as there are. `chance`
    is the frequency of the most frequent token in the training text; `ceiling` is None, for nobody knows it.

    Args:
        source: `docs`, the help texts that come with Python (`pydoc_data.topics`, some 460 kB that differ a little
            between versions of Python); `file`, a local text in UTF-8; `hub`, the part `train` of a hub data set.
        path: The file, or the data set's name on the hub (`roneneldan/TinyStories`).
        text_column: Where the data set has its texts; they are joined with an empty line between.
        max_size: How many characters (`byte`: bytes) of the text are used, from its beginning; None for all.
        level: What a token is: a `byte`, a `char` of the training text (with one token for all others), or a piece of
            a word, of a byte-level `bpe` that is trained on the training text.
        bpe_vocab: Tokens of the `bpe`, at the most; 256 of them are the bytes.
        seq_len: T.
        **common: As in `SequenceTask`.
    """

    ceiling = None

    def __init__(
        self,
        source: Literal["docs", "file", "hub"] = "docs",
        path: str | None = None,
        text_column: str = "text",
        max_size: int | None = None,
        level: Literal["byte", "char", "bpe"] = "byte",
        bpe_vocab: int = 2048,
        seq_len: int = 256,
        **common: Any,
    ):
        super().__init__(**common)
        if (path is None) != (source == "docs"):
            raise UserError("data.path goes with data.source 'file' or 'hub', which need it, and not with 'docs'")
        if seq_len < 1:
            raise UserError(f"data.seq_len must be at least 1, not {seq_len}")
        if max_size is not None and max_size < 1:
            raise UserError(f"data.max_size must be at least 1, not {max_size}")
        if bpe_vocab < 256:
            raise UserError(f"data.bpe_vocab must be at least 256, the number of bytes, not {bpe_vocab}")
        self.source, self.path, self.text_column, self.max_size = source, path, text_column, max_size
        self.level, self.bpe_vocab, self.seq_len = level, bpe_vocab, seq_len

    @property
    def vocab_size(self) -> int:
        """Tokens that the task knows; reads the text unless tokens are bytes."""
        match self.level:
            case "byte":
                return 256
            case "char":
                return len(self._characters) + 1
            case "bpe":
                return self._tokenizer.get_vocab_size()

    @property
    def chance(self) -> float:
        """Frequency of the most frequent token in the training text."""
        train = self._tokens["train"]
        return float(np.bincount(train).max() / len(train))

    def randomness(self, rng: np.random.Generator, count: int) -> tuple[np.ndarray, ...]:
        """Draw where windows of the training text begin."""
        return (rng.integers(len(self._tokens["train"]) - self.seq_len, size=count),)

    def rows(self, *drawn: np.ndarray) -> np.ndarray:
        """Cut windows out of the training text, as rows_B2T."""
        return self._windows("train", drawn[0])

    def fixed(self, split: Split, count: int) -> np.ndarray:
        """Cut at most `count` windows out of a held-out text, as rows_B2T."""
        length = len(self._tokens[split])
        count = min(count, length // (self.seq_len + 1))
        return self._windows(split, np.arange(count) * length // count)

    def parse(self, text: str) -> list[int]:
        """Make tokens of a text."""
        return self._encode(text.encode() if self.level == "byte" else text).tolist()

    def token_text(self, token: int) -> str:
        """Return one token as text, without line breaks and the like: these as in `repr`."""
        if self.level == "byte" and token > 127:
            return f"\\x{token:02x}"
        text = self.decode([token])
        return text if text.isprintable() else text.encode("unicode_escape").decode()

    def decode(self, tokens: Sequence[int]) -> str:
        """Return tokens as text."""
        match self.level:
            case "byte":
                return bytes(tokens).decode(errors="replace")
            case "char":
                return "".join([*map(chr, self._characters), UNKNOWN][token] for token in tokens)
            case "bpe":
                return self._tokenizer.decode(list(tokens))

    def _windows(self, part: str, start_B: np.ndarray) -> np.ndarray:
        window_WU = np.lib.stride_tricks.sliding_window_view(self._tokens[part], self.seq_len + 1)
        return label_next(window_WU[start_B])

    @cached_property
    def _texts(self) -> dict[str, str | bytes]:
        """Part -> its text; bytes where tokens are bytes."""
        text = self._read()
        held_out = len(text) // HELD_OUT_SHARE
        bounds = 0, len(text) - 2 * held_out, len(text) - held_out, len(text)
        parts = zip(("train", "validation", "test"), pairwise(bounds), strict=True)
        return {part: text[start:end] for part, (start, end) in parts}

    def _read(self) -> str | bytes:
        text: str | bytes
        match self.source:
            case "docs":
                from pydoc_data.topics import topics  # half a megabyte that only this source needs

                text = "\n".join(topics[name] for name in sorted(topics))
            case "file":
                text = self._read_file()
            case "hub":
                text = "\n\n".join(self._hub_texts())
        if isinstance(text, str) and self.level == "byte":
            text = text.encode()
        if not text:
            raise UserError(f"'{self.path}' is empty: there is no text to train on")
        return text[: self.max_size]

    def _read_file(self) -> str | bytes:
        if not Path(self.path).is_file():
            raise UserError(f"no text file at '{self.path}' (data.path)")
        if self.level == "byte":
            with open(self.path, "rb") as file:
                return file.read(-1 if self.max_size is None else self.max_size)
        try:
            with open(self.path, encoding="utf-8", newline="") as file:
                return file.read(self.max_size)
        except UnicodeDecodeError as error:
            reason = f"'{self.path}' is not a text in UTF-8 ({error.reason}); data.level 'byte' takes any file"
            raise UserError(reason) from None

    def _hub_texts(self) -> Iterator[str]:
        from datasets import load_dataset  # the import takes seconds, and only the hub needs it

        size, streaming = 0, self.max_size is not None  # streamed, a part of it does not need all of it
        for row in load_dataset(self.path, split="train", streaming=streaming):
            if not isinstance(row.get(self.text_column), str):
                raise UserError(f"'{self.path}' has no text in data.text_column '{self.text_column}': it has {[*row]}")
            yield row[self.text_column]
            size += len(row[self.text_column])
            if streaming and size >= self.max_size:
                return

    @cached_property
    def _tokens(self) -> dict[str, np.ndarray]:
        """Part -> its tokens."""
        tokens = {part: self._encode(text) for part, text in self._texts.items()}
        for part, part_tokens in tokens.items():
            if len(part_tokens) <= self.seq_len:
                raise UserError(
                    f"the text is too short: its {part} part has {len(part_tokens)} tokens, and a row of data.seq_len "
                    f"{self.seq_len} needs {self.seq_len + 1}"
                )
        return tokens

    def _encode(self, text: str | bytes) -> np.ndarray:
        match self.level:
            case "byte":
                return np.frombuffer(text, np.uint8)
            case "char":
                codes, unknown = _codes(text), len(self._characters)
                tokens = np.searchsorted(self._characters, codes).clip(max=unknown - 1)
                return np.where(self._characters[tokens] == codes, tokens, unknown).astype(np.int32)
            case "bpe":
                encoded = self._tokenizer.encode_batch(_pieces(text))
                return np.concatenate([np.array(piece.ids, np.int32) for piece in encoded])

    @cached_property
    def _characters(self) -> np.ndarray:
        """Code points of the training text's characters, sorted."""
        return np.unique(_codes(self._texts["train"]))

    @cached_property
    def _tokenizer(self) -> Any:
        from tokenizers import ByteLevelBPETokenizer  # only this level needs it

        tokenizer = ByteLevelBPETokenizer()
        pieces = _pieces(self._texts["train"])
        tokenizer.train_from_iterator(pieces, vocab_size=self.bpe_vocab, show_progress=False)
        return tokenizer


def _codes(text: str) -> np.ndarray:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _pieces(text: str) -> list[str]:
    return [text[start : start + PIECE] for start in range(0, max(len(text), 1), PIECE)]
