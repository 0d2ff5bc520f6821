"""The recall grid as a table, and as a picture.

Shapes: P parts of a row; an axis of length 2 holds outside and inside of the window.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightning_modules.core.intervals import wilson_interval
from lightning_modules.groundthink.probes.silence import State

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_COLUMNS = 6  # more columns of cells with a text cannot be read at the width that TensorBoard shows


@dataclass(frozen=True)
class Cell:
    """One point of the grid: rows of one kind, with the recurrent state on, cleared or off.

    Attributes:
        task: Kind of the rows.
        needles: Needles per row.
        length: Tokens per row.
        state: The recurrent state.
        hits_P2: Queries that the model answers, by the needle's part of the row, outside and inside of the window; NaN
            if the model diverged.
        count_P2: All queries.
    """

    task: str
    needles: int
    length: int
    state: State
    hits_P2: Tensor
    count_P2: Tensor


@dataclass(frozen=True)
class Line:
    """Some queries of a cell with their accuracy and its 95 % interval (Wilson).

    Attributes:
        task: Kind of the rows.
        needles: Needles per row.
        length: Tokens per row.
        depth: Where the needles begin: part of the row in percent, such as `25-50`.
        window: Whether window attention could see the value, `inside` or `outside`; None for a model without it.
        state: The recurrent state.
        hits: Queries that the model answers.
        n: All queries.
    """

    task: str
    needles: int
    length: int
    depth: str
    window: str | None
    state: State
    hits: int | None
    n: int

    @property
    def interval(self) -> tuple[float, float]:
        """The interval of the accuracy; NaN if the model diverged."""
        return (math.nan, math.nan) if self.hits is None else wilson_interval(self.hits, self.n)

    @property
    def plain(self) -> dict[str, Any]:
        """The line as plain types, with its accuracy and interval."""
        known = self.hits is not None
        low_high = [round(bound, 6) for bound in self.interval] if known else None
        return asdict(self) | {"accuracy": self.hits / self.n if self.hits is not None else None, "interval": low_high}


def lines(cells: Sequence[Cell], windowed: bool) -> list[Line]:
    """Return a line for each part of each cell that has queries.

    Args:
        cells: The grid.
        windowed: Whether the model has window attention.
    """
    made = []
    for cell in cells:
        parts = len(cell.count_P2)
        for part, inside in np.ndindex(parts, 2):
            if n := int(cell.count_P2[part, inside]):
                hits = float(cell.hits_P2[part, inside])
                depth = f"{100 * part // parts}-{100 * (part + 1) // parts}"
                window = ("outside", "inside")[inside] if windowed else None
                known = None if math.isnan(hits) else round(hits)
                made.append(Line(cell.task, cell.needles, cell.length, depth, window, cell.state, known, n))
    return made


def markdown(rows: Sequence[Line]) -> str:
    """Return the lines as a table, with one column of accuracies for each state."""
    states = [state for state in ("on", "cleared", "off") if any(row.state == state for row in rows)]
    head = ["task", "needles", "length", "depth (%)", "window", "queries", *(f"state {state}" for state in states)]
    accuracy: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        where = row.task, row.needles, row.length, row.depth, row.window or "none", row.n
        low, high = row.interval
        text = "diverged" if row.hits is None else f"{row.hits / row.n:.1%} [{low:.1%}, {high:.1%}]"
        accuracy.setdefault(where, {})[row.state] = text
    body = [[*map(str, where), *(by_state.get(state, "") for state in states)] for where, by_state in accuracy.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *body])


def heat_map(cells: Sequence[Cell]) -> "Figure":
    """Draw accuracies with the state on: for each kind and number of needles, depth over length; n stands below each.

    Args:
        cells: The grid of one kind of rows.
    """
    from matplotlib.figure import Figure

    shown = [cell for cell in cells if cell.state == "on"]
    needles = sorted({cell.needles for cell in shown})
    lengths = sorted({cell.length for cell in shown})
    parts = len(shown[0].count_P2)
    figure = Figure(figsize=(6, (0.45 * parts + 1.1) * len(needles) + 0.5), layout="constrained")
    panels = figure.subplots(len(needles), 1, squeeze=False)[:, 0]
    for axes, number in zip(panels, needles, strict=True):
        share_PL, count_PL = np.full((parts, len(lengths)), np.nan), np.zeros((parts, len(lengths)), int)
        for cell in shown:
            if cell.needles == number:
                column = lengths.index(cell.length)
                count_PL[:, column] = cell.count_P2.sum(1).numpy()
                share_PL[:, column] = cell.hits_P2.sum(1).numpy() / np.maximum(count_PL[:, column], 1)
        share_PL[count_PL == 0] = np.nan
        _draw(axes, share_PL, count_PL, lengths)
        axes.set_title(f"{shown[0].task}, {number} {'needle' if number == 1 else 'needles'}", fontsize=11)
    panels[-1].set_xlabel("length of the row (tokens)", fontsize=11)
    figure.colorbar(panels[-1].images[0], ax=panels.tolist(), label="accuracy per query")
    return figure


def _draw(axes: "Axes", share_PL: np.ndarray[Any, Any], count_PL: np.ndarray[Any, Any], lengths: list[int]) -> None:
    parts = len(share_PL)
    axes.imshow(share_PL, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes.set_xticks(range(len(lengths)), [str(length) for length in lengths])
    axes.set_yticks(range(parts), [f"{100 * p // parts}-{100 * (p + 1) // parts}" for p in range(parts)])
    axes.set_ylabel("depth (%)", fontsize=11)
    if len(lengths) > MOST_COLUMNS:
        return
    for part, column in zip(*np.nonzero(count_PL), strict=True):
        share = share_PL[part, column]
        color = "white" if share < 0.6 else "black"
        text = f"{share:.1%}\nn = {count_PL[part, column]}"
        axes.text(column, part, text, ha="center", va="center", color=color, fontsize=8)
