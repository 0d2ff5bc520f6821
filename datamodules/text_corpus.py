"""Language modelling on a text: the next byte, character or byte-pair token.

Shapes: B rows, W windows, T positions, U = T + 1 tokens of a window.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from datamodules.batch import Integers
from datamodules.errors import SIZE, UserError, check_numbers
from datamodules.sequence_task import SequenceTask, Split, label_next
from datamodules.sources import hub_rows, reading

if TYPE_CHECKING:
    from tokenizers import ByteLevelBPETokenizer

HELD_OUT_PARTS = 20  # the last of 20 parts of the text is the test text, the one before it the validation text
PIECE = 100_000  # characters per call of the tokenizer
UNKNOWN = "�"


class TextCorpus(SequenceTask):
    """Windows of a text; the label of each token is the next one.

    A row with `level` `char` and `seq_len` 8, shown as text::

        tokens  t h e _ c a t _
        labels  h e _ c a t _ s

    The last 5 % of the text are for testing, and the 5 % before them for validation. Training rows begin anywhere in
    the rest. Held-out rows are windows that do not overlap, spread evenly; there are fewer than `validation_size` or
    `test_size` of them if the text is short. `chance` is the frequency of the most frequent token in the training text;
    `ceiling` is None, because it is unknown.

    Args:
        source: `docs`, the help texts that come with Python (`pydoc_data.topics`, about 460 kB, slightly different in
            each version of Python); `file`, a local text in UTF-8; `hub`, the split `train` of a hub data set.
        path: The file, or the name of the hub data set (`roneneldan/TinyStories`).
        text_column: The column of the data set with the texts, which are joined by an empty line.
        max_size: Characters (`byte`: bytes) of the text to use, from its start; None for all.
        level: `byte`; `char`, the characters of the training text with one token for all others; or `bpe`, the tokens
            of a byte-level byte-pair encoding that is trained on the training text.
        bpe_vocab: Largest vocabulary of `bpe`, of which 256 tokens are the bytes.
        seq_len: T.
        **common: Arguments of `SequenceTask`.
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
        check_numbers("data", 1, SIZE, seq_len=seq_len)
        check_numbers("data", 1, max_size=max_size)
        check_numbers("data", 256, SIZE, bpe_vocab=bpe_vocab)  # a token for each byte
        self.source, self.path, self.text_column, self.max_size = source, path or "", text_column, max_size
        self.level, self.bpe_vocab, self.seq_len = level, bpe_vocab, seq_len

    @cached_property
    def vocab_size(self) -> int:  # type: ignore[override]  # computed from the text when it is first read
        """Tokens of the task; reads the text unless tokens are bytes."""
        match self.level:
            case "byte":
                return 256
            case "char":
                return len(self._characters) + 1
            case "bpe":
                return int(self._tokenizer.get_vocab_size())

    @cached_property
    def chance(self) -> float:  # type: ignore[override]  # likewise
        """Frequency of the most frequent token in the training text."""
        train = self._tokens["train"]
        return float(np.bincount(train).max() / len(train))

    def randomness(self, rng: np.random.Generator, count: int) -> tuple[Integers, ...]:
        """Draw the first position of windows of the training text."""
        return (rng.integers(len(self._tokens["train"]) - self.seq_len, size=count),)

    def rows(self, *drawn: Integers) -> Integers:
        """Cut windows out of the training text, rows_B2T."""
        return self._windows("train", drawn[0])

    def fixed(self, split: Split, count: int) -> Integers:
        """Cut at most `count` windows out of a held-out text, rows_B2T."""
        length = len(self._tokens[split])
        count = min(count, length // (self.seq_len + 1))
        return self._windows(split, np.arange(count) * length // count)

    def parse(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        tokens: list[int] = self._encode(self._as_level(text)).tolist()
        return tokens

    def token_text(self, token: int) -> str:
        """Return one token as text; characters that cannot be printed are escaped, as in `repr`."""
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
                return str(self._tokenizer.decode(list(tokens)))

    def _windows(self, part: str, start_B: Integers) -> Integers:
        window_WU = np.lib.stride_tricks.sliding_window_view(self._tokens[part], self.seq_len + 1)
        return label_next(window_WU[start_B])

    @cached_property
    def _texts(self) -> dict[str, str | bytes]:
        """Part -> its text; bytes if tokens are bytes."""
        text = self._read()
        held_out = len(text) // HELD_OUT_PARTS
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
        if not text:
            raise UserError(f"'{self.path}' (data.path) is empty: there is no text to train on")
        return self._as_level(text)[: self.max_size]

    def _as_level(self, text: str | bytes) -> str | bytes:
        return text.encode() if isinstance(text, str) and self.level == "byte" else text

    def _read_file(self) -> str | bytes:
        size = -1 if self.max_size is None else self.max_size
        with reading(self.path, "data.path"):
            if self.level == "byte":
                with open(self.path, "rb") as file:
                    return file.read(size)
            try:
                with open(self.path, encoding="utf-8-sig", newline="") as text_file:
                    return text_file.read(size)
            except UnicodeDecodeError as error:
                raise UserError(
                    f"'{self.path}' (data.path) is not a text in UTF-8 ({error.reason}); "
                    "data.level 'byte' takes any file"
                ) from error

    def _hub_texts(self) -> Iterator[str]:
        size, streaming = 0, self.max_size is not None  # streaming downloads the part that is used
        for row in hub_rows(self.path, split="train", streaming=streaming, local_source="file"):
            text = row.get(self.text_column)
            if not isinstance(text, str):
                raise UserError(f"'{self.path}' has no text in data.text_column '{self.text_column}': it has {[*row]}")
            yield text
            size += len(text)
            if self.max_size is not None and size >= self.max_size:
                return

    @cached_property
    def _tokens(self) -> dict[str, Integers]:
        """Part -> its tokens."""
        tokens = {part: self._encode(text) for part, text in self._texts.items()}
        for part, part_tokens in tokens.items():
            if len(part_tokens) <= self.seq_len:
                raise UserError(
                    f"the text is too short: its {part} part has {len(part_tokens)} tokens, and a row of data.seq_len "
                    f"{self.seq_len} needs {self.seq_len + 1}"
                )
        return tokens

    def _encode(self, text: str | bytes) -> Integers:
        if isinstance(text, bytes):
            return np.frombuffer(text, np.uint8)
        if self.level == "char":
            codes, unknown = _codes(text), len(self._characters)
            tokens = np.searchsorted(self._characters, codes).clip(max=unknown - 1)
            return np.where(self._characters[tokens] == codes, tokens, unknown).astype(np.int32)
        encoded = self._tokenizer.encode_batch(_pieces(text))
        return np.concatenate([np.array(piece.ids, np.int32) for piece in encoded])

    @cached_property
    def _characters(self) -> npt.NDArray[np.uint32]:
        """Code points of the characters in the training text, sorted."""
        return np.unique(_codes(self._train_text))

    @cached_property
    def _tokenizer(self) -> "ByteLevelBPETokenizer":
        from tokenizers import ByteLevelBPETokenizer

        tokenizer = ByteLevelBPETokenizer()
        pieces = _pieces(self._train_text)
        tokenizer.train_from_iterator(pieces, vocab_size=self.bpe_vocab, show_progress=False)
        return tokenizer

    @property
    def _train_text(self) -> str:
        text = self._texts["train"]
        assert isinstance(text, str)  # only a text of bytes is not, and it needs no vocabulary
        return text


def _codes(text: str) -> npt.NDArray[np.uint32]:
    return np.frombuffer(text.encode("utf-32-le"), np.uint32)


def _pieces(text: str) -> list[str]:
    return [text[start : start + PIECE] for start in range(0, max(len(text), 1), PIECE)]
