"""The target's rows: prompt and answer in tokens, the place for vectors, and the packing of a batch of rows.

Shapes: B batch, K vectors (soft tokens, or a text prefix), T packed positions, N answer tokens of the whole batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class Row:
    """One row for the target.

    Attributes:
        prompt: Tokens of the prompt.
        place: Index in `prompt` before which vectors go in.
        answer: Tokens of the reference answer, EOS last.
    """

    prompt: list[int]
    place: int
    answer: list[int]

    def length(self, vectors: int) -> int:
        """Return the positions of the packed row with so many vectors; its last answer token is a label only."""
        return len(self.prompt) + vectors + len(self.answer) - 1

    def filled(self, vectors: list[int], filler: int) -> tuple[list[int], list[int]]:
        """Return the prompt with vectors in it: its tokens, and for each the vector in its place, -1 for none.

        Args:
            vectors: The indices of the vectors.
            filler: The token under a vector.
        """
        before, after = self.prompt[: self.place], self.prompt[self.place :]
        columns = [-1] * len(before) + vectors + [-1] * len(after)
        return before + [filler] * len(vectors) + after, columns


@dataclass
class Packing:
    """A batch of rows without holes, padded at their ends.

    Attributes:
        tokens_BT: The tokens.
        column_BT: For each position the vector in its place, -1 for none.
        predict_N: Flat positions (row * T + column) whose logits predict the answer tokens.
        labels_N: The answer tokens.
        place_N: The place of each of them in its answer, from 0.
        padding: The number of positions behind the ends of rows.
    """

    tokens_BT: Tensor
    column_BT: Tensor
    predict_N: Tensor
    labels_N: Tensor
    place_N: Tensor
    padding: int


def real_vectors(mask_BK: Tensor | None, size: int) -> list[list[int]]:
    """Return the indices of each row's real vectors."""
    if mask_BK is None:
        return [[] for _ in range(size)]
    return [[k for k, real in enumerate(row) if real] for row in mask_BK.tolist()]


def pack(rows: Sequence[Row], filler: int, mask_BK: Tensor | None = None) -> Packing:
    """Pack rows of a prompt, the real vectors in it, and the answer.

    Args:
        rows: The rows.
        filler: The token under vectors, and of the padding.
        mask_BK: True at real vectors; None for rows without vectors.
    """
    filled = [row.filled(vectors, filler) for row, vectors in zip(rows, real_vectors(mask_BK, len(rows)), strict=True)]
    # The last answer token is a label only: nothing has to follow it
    wholes = [tokens + row.answer[:-1] for (tokens, _), row in zip(filled, rows, strict=True)]
    width = max(map(len, wholes))
    predict = [
        number * width + len(tokens) - 1 + index
        for number, ((tokens, _), row) in enumerate(zip(filled, rows, strict=True))
        for index in range(len(row.answer))
    ]
    return Packing(
        torch.tensor([whole + [filler] * (width - len(whole)) for whole in wholes]),
        torch.tensor([columns + [-1] * (width - len(columns)) for _, columns in filled]),
        torch.tensor(predict),
        torch.tensor([token for row in rows for token in row.answer]),
        torch.tensor([place for row in rows for place in range(len(row.answer))]),
        width * len(wholes) - sum(map(len, wholes)),
    )
