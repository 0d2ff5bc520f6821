"""Where the needles of a row stand, and where their queries are.

A needle is a key with its value behind it; a query is a position with a label.

Shapes: B rows, T positions, N needles per row, Q queries of all rows.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from datamodules.batch import IGNORE, TokenBatch
from datamodules.token_rows import write_distances

ROLES = ("key", "value", "query", "filler")


def roles(batch: TokenBatch, values: range) -> dict[str, Tensor]:
    """Return the positions of each role, bool [B, T]: every position has one role.

    Args:
        batch: Rows in which values stand behind their keys, and nowhere else.
        values: The tokens that are values.
    """
    tokens_BT, query_BT = batch["tokens"], batch["labels"] != IGNORE
    value_BT = (tokens_BT >= values.start) & (tokens_BT < values.stop) & ~query_BT
    key_BT = torch.zeros_like(value_BT)
    key_BT[:, :-1] = value_BT[:, 1:]
    return {"key": key_BT, "value": value_BT, "query": query_BT, "filler": ~(key_BT | value_BT | query_BT)}


def places(mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positions at which the mask is true, in order, and which of them exist: int64 and bool [B, N].

    N is the largest count in a row.
    """
    most = int(mask_BT.sum(1).max())
    place_BN = (~mask_BT).int().argsort(dim=1, stable=True)[:, :most]
    return place_BN, mask_BT.gather(1, place_BN)


def first_queries(labels_BT: Tensor) -> Tensor:
    """Return the position of each row's first query, int64 [B]; T in a row without one."""
    asked_BT = labels_BT != IGNORE
    return torch.where(asked_BT.any(1), asked_BT.int().argmax(1), asked_BT.shape[1])


@dataclass(frozen=True)
class Queries:
    """The queries of some rows, int64 [Q].

    Attributes:
        row_Q: Row.
        time_Q: Position.
        label_Q: Label.
        place_Q: Position of the needle's key, of the one written last if there are several.
    """

    row_Q: Tensor
    time_Q: Tensor
    label_Q: Tensor
    place_Q: Tensor

    @staticmethod
    def of(batch: TokenBatch) -> "Queries":
        """Return the queries of a batch."""
        tokens_BT, labels_BT = batch["tokens"], batch["labels"]
        row_Q, time_Q = (labels_BT != IGNORE).nonzero(as_tuple=True)
        distance_Q = write_distances(tokens_BT, labels_BT)[row_Q, time_Q]
        return Queries(row_Q, time_Q, labels_BT[row_Q, time_Q], time_Q - distance_Q)

    def needle(self, place_BN: Tensor) -> Tensor:
        """Return the index of each query's needle among the places of the row's keys, int64 [Q]."""
        return (place_BN[self.row_Q] == self.place_Q[:, None]).int().argmax(1)

    def depth(self, length: int, parts: int) -> Tensor:
        """Return in which of `parts` equal parts of a row of `length` the needle lies, int64 [Q]; part 0 is first."""
        return self.place_Q * parts // length

    def within(self, reach: int) -> Tensor:
        """Return whether the needle's value is at most `reach` positions before the query, bool [Q]."""
        return self.time_Q - (self.place_Q + 1) <= reach


def answers(batch: TokenBatch, queries: Queries) -> Tensor:
    """Return all values that were written to the key of each query, int64 [Q, R]; each key has R values."""
    tokens_BT, labels_BT = batch["tokens"], batch["labels"]
    key_Q = tokens_BT[queries.row_Q, queries.time_Q]
    written_QT = (tokens_BT[queries.row_Q] == key_Q[:, None]) & (labels_BT[queries.row_Q] == IGNORE)
    query_K, place_K = written_QT.nonzero(as_tuple=True)
    return tokens_BT[queries.row_Q[query_K], place_K + 1].view(len(key_Q), -1)
