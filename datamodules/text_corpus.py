"""Language modelling on a text: the next byte, character or byte-pair token.

Shapes: B rows, W windows, T positions, U = T + 1 tokens of a window.
"""

from collections.abc import Sequence
from functools import cached_property
from typing import Any, Literal

import numpy as np

from datamodules.batch import Integers, TokenBatch
from datamodules.errors import SIZE, UserError, check_numbers
from datamodules.loader import UnchangedLoader
from datamodules.sequence_task import SequenceTask, Split, collate, label_next
from datamodules.text_levels import Level, TextLevel, learned, restored
from datamodules.text_source import Source, check_predictable, read_text

# Where validation, training and test text begin and end, in twentieths of the text
PARTS = {
    "90/5/5": {"train": (0, 18), "validation": (18, 19), "test": (19, 20)},
    "5/85/10": {"validation": (0, 1), "train": (1, 18), "test": (18, 20)},
}


class TextCorpus(SequenceTask):
    """Windows of a text; the label of each token is the next one.

    A row with `level` `char` and `seq_len` 8, shown as text::

        tokens  t h e _ c a t _
        labels  h e _ c a t _ s

    With `split` `90/5/5` the last 5 % of the text are for testing, and the 5 % before them for validation, as is usual
    for text8 and enwik8: 90, 5 and 5 million of their 100 million bytes. With `5/85/10` the last 10 % are for testing,
    the usual test text of tinyshakespeare, and the first 5 % for validation. A validation text before the test text
    would take from the training what is most like the test: the beginning of the same play. Others train on all of
    the first 90 %, and validate on the test text.

    Training rows begin anywhere in the training text. Held-out rows are windows that do not overlap, spread evenly;
    there are fewer than `validation_size` or `test_size` of them if the text is short. `chance` is the frequency of the
    most frequent token in the training text; `ceiling` is None, because it is unknown.

    The vocabulary is in checkpoints, so that a model reads the tokens that it was trained on, whatever the text.

    Args:
        source: `docs`, the help texts that come with Python (`pydoc_data.topics`, about 460 kB, slightly different in
            each version of Python); `file`, a local text in UTF-8; `hub`, the split `train` of a hub data set.
        path: The file, or the name of the hub data set (`roneneldan/TinyStories`).
        text_column: The column of the data set with the texts, which are joined by an empty line.
        max_size: Characters (`byte`: bytes) of the text to use, from its start; None for all.
        level: `byte`; `char`, the characters of the training text with one token for all others; or `bpe`, the tokens
            of a byte-level byte-pair encoding that is trained on the training text.
        bpe_vocab: Largest vocabulary of `bpe`, of which 256 tokens are the bytes.
        split: Shares of the text by position: training, validation and test, or validation, training and test.
        seq_len: T.
        **common: Arguments of `SequenceTask`.
    """

    ceiling = None

    predicts_next = True

    def __init__(
        self,
        source: Source = "docs",
        path: str | None = None,
        text_column: str = "text",
        max_size: int | None = None,
        level: Level = "byte",
        bpe_vocab: int = 2048,
        split: Literal["90/5/5", "5/85/10"] = "90/5/5",
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
        self.level, self.bpe_vocab, self.split, self.seq_len = level, bpe_vocab, split, seq_len

    @cached_property
    def vocab_size(self) -> int:  # type: ignore[override]  # computed from the text when it is first read
        """Tokens of the task; reads the text unless tokens are bytes."""
        return self._vocabulary.size

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
        return self._windows("train", drawn[0], self.seq_len)

    def fixed(self, split: Split, count: int) -> Integers:
        """Cut at most `count` windows out of a held-out text, rows_B2T."""
        return self._spread(split, count, self.seq_len)

    def text_rows(self, part: Literal["train", "validation", "test"], count: int, length: int) -> TokenBatch:
        """Return at most `count` windows of `length` positions, spread evenly over a part of the text.

        Raises:
            UserError: The part is shorter than a window.
        """
        if len(self._tokens[part]) <= length:
            tokens = f"{len(self._tokens[part])} tokens"
            raise UserError(f"the {part} part of the text has {tokens}, and a row of {length} needs {length + 1}")
        return collate(self._spread(part, count, length))

    def tokens_per_character(self, split: Split) -> float:
        """Return tokens / characters of a held-out text; 1 for bytes, of which each counts as a character."""
        return len(self._tokens[split]) / len(self._texts[split])

    def parse(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        tokens: list[int] = self._vocabulary.encode(text).tolist()
        return tokens

    def predict_dataloader(self) -> UnchangedLoader[TokenBatch]:
        """Return the inputs, or the first test rows.

        Raises:
            UserError: A character of an input has no token.
        """
        for text in self.inputs or []:
            if unknown := self.unknown_characters(text):
                listed = " ".join(map(repr, unknown))
                raise UserError(f"data.inputs: the vocabulary of the model lacks {listed} of '{text}'")
        return super().predict_dataloader()

    def unknown_characters(self, text: str) -> list[str]:
        """Return the characters of a text that have no token."""
        return self._vocabulary.lacks(text)

    def token_text(self, token: int) -> str:
        """Return one token as text; characters that cannot be printed are escaped, as in `repr`."""
        if self.level == "byte" and token > 127:
            return f"\\x{token:02x}"
        text = self.decode([token])
        return text if text.isprintable() else text.encode("unicode_escape").decode()

    def decode(self, tokens: Sequence[int]) -> str:
        """Return tokens as text."""
        return self._vocabulary.decode(tokens)

    def state_dict(self) -> dict[str, Any]:
        """Return the vocabulary, for a checkpoint."""
        return {"level": self.level, "vocabulary": self._vocabulary.state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the vocabulary of a checkpoint.

        Raises:
            UserError: It is of another level.
        """
        if state_dict["level"] != self.level:
            raise UserError(f"data.level is {self.level}, and the checkpoint was trained on {state_dict['level']}")
        known = vars(self).get("_vocabulary")
        if known is not None and known.state() == state_dict["vocabulary"]:
            return  # a long text is read once
        for name in ("vocab_size", "chance", "_tokens"):  # of the text's own vocabulary
            vars(self).pop(name, None)
        vars(self)["_vocabulary"] = restored(self.level, state_dict["vocabulary"])
        if self._held_out:
            self._held_out.clear()
            self.setup("")

    def _spread(self, part: str, count: int, length: int) -> Integers:
        size = len(self._tokens[part])
        count = min(count, size // (length + 1))
        return self._windows(part, np.arange(count) * size // count, length)

    def _windows(self, part: str, start_B: Integers, length: int) -> Integers:
        window_WU = np.lib.stride_tricks.sliding_window_view(self._tokens[part], length + 1)
        return label_next(window_WU[start_B])

    @cached_property
    def _texts(self) -> dict[str, str | bytes]:
        """Part -> its text; bytes if tokens are bytes."""
        text = read_text(self.source, self.path, self.text_column, self.max_size, self.level == "byte")
        twentieth = len(text) // 20
        # Training has the rest of the division
        place = {0: 0, 1: twentieth} | {part: len(text) - (20 - part) * twentieth for part in (18, 19, 20)}
        parts = {name: text[place[start] : place[end]] for name, (start, end) in PARTS[self.split].items()}
        check_predictable(parts["train"], f"the training part of '{self.path}' (data.path)")
        return parts

    @cached_property
    def _tokens(self) -> dict[str, Integers]:
        """Part -> its tokens."""
        tokens = {part: self._vocabulary.encode(text) for part, text in self._texts.items()}
        for part, part_tokens in tokens.items():
            if len(part_tokens) <= self.seq_len:
                raise UserError(
                    f"the text is too short: its {part} part has {len(part_tokens)} tokens, and a row of data.seq_len "
                    f"{self.seq_len} needs {self.seq_len + 1}"
                )
        return tokens

    @cached_property
    def _vocabulary(self) -> TextLevel:
        return learned(self.level, b"" if self.level == "byte" else self._texts["train"], self.bpe_vocab)
