"""Figures of a study: values by arm, curves over steps, and maps of two-way sweeps.

Sizes are for TensorBoard, which shows a figure about 500 pixels wide.
"""

import json
import re
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.tensorflow_stub.errors import OpError

from studies.engine.statistics import Estimate, Series, Values, mean, t_interval
from studies.engine.study import Run, Study

Logged = Callable[[str], dict[int, list[float]]]  # scalar -> step -> values, one per ensemble member
KEEP_ALL = {"scalars": 0}  # by default EventAccumulator keeps a sample of the events
STYLE: Any = {  # matplotlib's type is the list of its three hundred keys
    "font.size": 13,
    "axes.titlesize": 14,
    "legend.fontsize": 11,
    "lines.linewidth": 2,
    "figure.dpi": 100,
    "figure.constrained_layout.use": True,
}
WIDTH = 6.4  # inches
MAX_TICKS = 10
DASHES = ("-", "--", ":", "-.")  # colours repeat after ten arms
BESIDE = 6  # more arms than this have their legend beside the axes


@dataclass(frozen=True)
class Grid:
    """The means of a two-way sweep.

    Attributes:
        keys: The two keys: of the rows and of the columns.
        rows: Values of the first key.
        columns: Values of the second key.
        means: A mean for each row and column; NaN for an arm without a finished run.
    """

    keys: list[str]
    rows: list[str]
    columns: list[str]
    means: NDArray[np.float64]


def draw(study: Study, values: Values) -> dict[str, Figure]:
    """Return figures by name: a strip plot for each measure, a plot for each curve, a map for each two-way sweep."""
    figures = {}
    with matplotlib.rc_context(STYLE):
        for measure in study.measures:
            word = re.sub(r"\W+", "_", measure)
            by_arm = {arm: values[arm][measure] for arm in study.arms if values[arm][measure]}
            if by_arm:
                means = {arm: mean(series) for arm, series in by_arm.items()}
                figures[f"strip_{word}"] = strip(measure, by_arm, means)
            for sweep, grid in _grids(study, by_arm).items():
                figures[f"map_{sweep}_{word}"] = heat_map(measure, grid)
        logged = [(run.arm, _logged(run)) for run in study.runs if study.curves and run.result]
        for scalar in study.curves:
            if histories := _histories(scalar, logged):
                word = re.sub(r"\W+", "_", scalar)
                figures[f"curve_{word}"] = curves(scalar, histories)
            elif logged:
                sys.stderr.write(f"no curve of {scalar}, because no finished run has logged it\n")
    return figures


def strip(measure: str, by_arm: Mapping[str, Series], means: Mapping[str, Estimate]) -> Figure:
    """Draw a dot for each seed, and each arm's mean with its 95 % interval."""
    figure = Figure(figsize=(WIDTH, 1.7 + 0.4 * len(by_arm)))
    axes = figure.subplots()
    for place, (arm, series) in enumerate(by_arm.items()):
        values = [measured.value for measured in series.values()]
        shift = np.linspace(-0.15, 0.15, len(values)) if len(values) > 1 else np.zeros(1)
        seeds = "seed" if place == 0 else None
        axes.plot(values, place - 0.1 + shift, "o", color="tab:blue", alpha=0.5, markersize=7, label=seeds)
        estimate = means[arm]
        known = np.isfinite([estimate.low, estimate.high]).all()
        ends = [[estimate.value - estimate.low], [estimate.high - estimate.value]] if known else None
        label = "mean, 95 % interval" if place == 0 else None
        axes.errorbar([estimate.value], [place + 0.25], xerr=ends, label=label, fmt="D", color="black", capsize=3)
    axes.set_yticks(range(len(by_arm)), list(by_arm))
    axes.set(title=measure, ylim=(len(by_arm) - 0.4, -0.5))  # the first arm at the top
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    return figure


def curves(scalar: str, histories: Mapping[str, Mapping[int, Sequence[float]]]) -> Figure:
    """Draw the mean over seeds by step, with Student's 95 % band where there are at least two seeds.

    Args:
        scalar: Name of the scalar.
        histories: Arm -> step -> values over seeds.
    """
    beside = len(histories) > BESIDE
    figure = Figure(figsize=(WIDTH + 2.4 if beside else WIDTH, max(4.2, 0.5 + 0.26 * len(histories))))
    axes = figure.subplots()
    for number, (arm, history) in enumerate(histories.items()):
        colour, dashes = f"C{number % 10}", DASHES[number // 10 % len(DASHES)]
        steps = sorted(step for step in history if history[step])
        axes.plot(steps, [np.mean(history[step]) for step in steps], dashes, label=arm, color=colour)
        banded = [step for step in steps if len(history[step]) > 1]
        if banded:
            low, high = zip(*(t_interval(np.array(history[step])) for step in banded), strict=True)
            axes.fill_between(banded, low, high, alpha=0.2, color=colour, linewidth=0)
    axes.set(xlabel="step", title=scalar)
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.yaxis.set_major_locator(MaxNLocator(6))
    axes.grid(alpha=0.3)
    if beside:
        figure.legend(loc="outside right upper")
    else:
        axes.legend()
    return figure


def heat_map(measure: str, grid: Grid) -> Figure:
    """Draw the means of a two-way sweep as colours, with numbers where there is room."""
    rows, columns = grid.means.shape
    has_room = max(rows, columns) <= MAX_TICKS
    figure = Figure(figsize=(max(WIDTH, 2 + 0.8 * columns) if has_room else WIDTH, 1.8 + 0.5 * min(rows, MAX_TICKS)))
    axes = figure.subplots()
    image = axes.imshow(grid.means, aspect="auto", origin="lower")
    if has_room and np.isfinite(grid.means).any():
        low, high = np.nanmin(grid.means), np.nanmax(grid.means)
        for i, j in np.argwhere(np.isfinite(grid.means)):
            bright = grid.means[i, j] - low > 0.6 * (high - low)
            axes.text(
                j,
                i,
                f"{grid.means[i, j]:.3g}",
                ha="center",
                va="center",
                color="black" if bright else "white",
                fontsize=11,
            )
    _label(axes.yaxis, grid.rows)
    _label(axes.xaxis, grid.columns)
    axes.set(ylabel=grid.keys[0], xlabel=grid.keys[1], title=measure)
    figure.colorbar(image)
    return figure


def _label(axis: Axis, words: list[str]) -> None:
    """Label an axis with at most ten of the words, at equal distances."""
    places = range(0, len(words), -(-len(words) // MAX_TICKS))
    axis.set_ticks(list(places), [words[place] for place in places])


def _grids(study: Study, by_arm: Mapping[str, Series]) -> dict[str, Grid]:
    """Return the grid of each two-way sweep."""
    sweeps: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for arm, factors in study.factors.items():
        if len(factors.values) == 2:
            sweeps[factors.sweep][arm] = factors.values
    grids = {}
    for sweep, arms in sweeps.items():
        keys = list(next(iter(arms.values())))
        rows, columns = (list(dict.fromkeys(str(values[key]) for values in arms.values())) for key in keys)
        means = np.full((len(rows), len(columns)), np.nan)
        for arm, values in arms.items():
            if arm in by_arm:
                means[rows.index(str(values[keys[0]])), columns.index(str(values[keys[1]]))] = mean(by_arm[arm]).value
        grids[sweep] = Grid(keys, rows, columns, means)
    return grids


def _logged(run: Run) -> Logged:
    """Return a function that gives what a run logged; it reads the run's files once."""
    members = _member_lines(run.folder / "members.jsonl")

    @cache
    def events() -> dict[str, dict[int, float]]:
        return _scalars(run.folder)

    def of(scalar: str) -> dict[int, list[float]]:
        if any(scalar in line for line in members):
            return {line["step"]: [x for x in line.get(scalar, []) if x is not None] for line in members}
        return {step: [value] for step, value in events().get(scalar, {}).items()}

    return of


def _member_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines that an ensemble wrote at its validations, without those that a kill or a full disk has cut."""
    lines = []
    for text in path.read_bytes().splitlines() if path.is_file() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append({key: value for key, value in line.items() if key == "step" or isinstance(value, list)})
    return lines


def _scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return the scalars in a run's events: name -> step -> value, the last one if a step was passed twice."""
    try:
        events = EventAccumulator(str(folder), size_guidance=KEEP_ALL).Reload()
        names = events.Tags()["scalars"]
        return {name: {event.step: event.value for event in events.Scalars(name)} for name in names}
    except (OSError, OpError) as error:
        sys.stderr.write(f"no curves of {folder}, because its TensorBoard events cannot be read: {error}\n")
        return {}


def _histories(scalar: str, runs: list[tuple[str, Logged]]) -> dict[str, dict[int, list[float]]]:
    """Return arm -> step -> the scalar's values over seeds."""
    histories: dict[str, dict[int, list[float]]] = {}
    for arm, logged in runs:
        for step, values in logged(scalar).items():
            histories.setdefault(arm, defaultdict(list))[step] += values
    return histories
