"""The states of a frozen source at the questions of a data set: written once to files, and read from them in training.

Shapes: B batch, S source positions of a question, C source width.
"""

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable
from warnings import warn

from torch import Tensor

from datamodules.errors import UserError
from lightning_modules.core.samples import gather_objects
from lightning_modules.telepathy.state_file import StateFile, States

FOLDER = Path("runs", "source_states")
FORMAT = "1"  # of the files; another one is another key
FILE_BYTES = 2**28  # of the states in a file, about
LONGEST_STATE = 4  # bytes of a feature at most


@runtime_checkable
class HasQuestions(Protocol):
    """A datamodule that knows the questions of its problems."""

    def questions(self) -> list[str] | None:
        """Return the questions of all sets; None if there is no end of them."""
        ...


def fixed_questions(data: object) -> list[str]:
    """Return the questions of a datamodule.

    Raises:
        UserError: It has none, or draws new ones in training.
    """
    if not isinstance(data, HasQuestions):
        raise UserError(f"model.cache_source: {type(data).__name__} has no questions")
    questions = data.questions()
    if questions is None:
        raise UserError(
            "model.cache_source needs problems that are read more than once, and data.source 'generated' draws new "
            "ones in every step: use 'file' or 'hub'"
        )
    return questions


class SourceCache:
    """Files with the states of a source at a set of questions.

    The folder `runs/source_states/<key>` has safetensors files of about 256 MB, each with `states`, [N, C] in the type
    that the source gives, and a checksum. Nothing is rounded. The key depends on all that the states depend on: the
    source's weights and configuration, its layers, its tokens for each question, and the precision of the run. A file
    appears as a whole and holds its own checksum, so runs that write the same cache at once may replace each other's
    files by files that are as good.

    Args:
        identity: What the states depend on beside the questions; plain types.
        questions: The questions; each is stored once.
        rows: The source's tokens of each question, in the same order.
        lengths: Number S of states of each question.
        width: C.
        folder: The folder of all caches.

    Attributes:
        folder: The folder of this cache.
    """

    def __init__(
        self,
        identity: dict[str, Any],
        questions: Sequence[str],
        rows: Sequence[Sequence[int]],
        lengths: Sequence[int],
        width: int,
        folder: Path = FOLDER,
    ):
        # Sorted, so that rows of a batch are of one length; by their text too, so that no order of the data matters
        known = {
            text: (len(row), text, [*row], count) for text, row, count in zip(questions, rows, lengths, strict=True)
        }
        ordered = sorted(known.values())
        content = [FORMAT, identity, width, [(row, length) for _, _, row, length in ordered]]
        self.key = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        self.folder = folder / self.key[:32]
        self._files = list(self._cut([(text, length) for _, text, _, length in ordered], width))
        self._place: dict[str, tuple[int, int, int]] = {}
        for number, file in enumerate(self._files):
            end = 0
            for text, length in zip(file.questions, file.lengths, strict=True):
                self._place[text] = number, end, end + length
                end += length
        self._opened: dict[int, Any] = {}

    def _cut(self, ordered: Sequence[tuple[str, int]], width: int) -> Iterator[StateFile]:
        """Yield files of questions; a file ends with the question that fills it."""
        most, start, total = max(FILE_BYTES // (LONGEST_STATE * width), 1), 0, 0
        for end, (_, length) in enumerate(ordered, 1):
            total += length
            if total >= most or end == len(ordered):
                texts, lengths = zip(*ordered[start:end], strict=True)
                yield StateFile(self.folder / f"states-{start:08}.safetensors", self.key, texts, lengths)
                start, total = end, 0

    def __contains__(self, question: str) -> bool:
        return question in self._place

    def fill(self, states: States, rank: int = 0, world: int = 1) -> int:
        """Write the files that are missing or damaged; every rank must call it and does its part.

        Args:
            states: Returns the states of questions; it is not called if all files are there.
            rank: Index of this process.
            world: Number of processes.

        Returns:
            The number of files that this rank has written.

        Raises:
            UserError: A rank cannot write a file, or another one does not see it.
        """
        written, failure = 0, ""
        for file in self._files[rank::world]:
            fault = file.fault()
            if fault is None:
                continue
            if fault:  # told by every rank, since each looks at other files
                warn(f"model.cache_source: {file.path} is damaged, {fault}; it is written again", stacklevel=2)
            if failure := file.write(states):
                break
            written += 1
        if failures := [text for text in gather_objects(failure) if text]:  # this also waits for the other ranks
            raise UserError(f"model.cache_source: cannot write {failures[0]}")
        missing = [str(file.path) for file in self._files if not file.path.is_file()]
        if lacking := [paths[0] for paths in gather_objects(missing[:1]) if paths]:
            raise UserError(
                f"model.cache_source: {self.folder} must lie on a file system that all machines share: one of them "
                f"lacks {lacking[0]}"
            )
        return written

    def read(self, questions: Sequence[str]) -> Tensor:
        """Return states_BSC of questions, zero behind the end of a question.

        Raises:
            UserError: A question is not in the cache, or a file has vanished since the run began.
        """
        parts = [self._read(question) for question in questions]
        states_BSC = parts[0].new_zeros(len(parts), max(map(len, parts)), parts[0].shape[-1])
        for state_SC, row_SC in zip(parts, states_BSC, strict=True):
            row_SC[: len(state_SC)] = state_SC
        return states_BSC

    def _read(self, question: str) -> Tensor:
        if question not in self._place:
            raise UserError(f"model.cache_source: the source has not read {question[:40]!r}..., and is not in memory")
        number, start, end = self._place[question]
        if number not in self._opened:
            self._opened[number] = self._files[number].open()
        states_SC: Tensor = self._opened[number][start:end]
        return states_SC
