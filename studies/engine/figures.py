"""Pictures of a study: values by arm, curves over steps, and maps of two-way sweeps."""

import json
import re
from collections import defaultdict
from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from studies.engine.statistics import Series, mean, t_interval
from studies.engine.study import Run, Study

if TYPE_CHECKING:
    from studies.engine.report import Values

Logged = Callable[[str], dict[int, list[float]]]  # scalar -> step -> its values, one for each member
STEPS = {"scalars": 0}  # EventAccumulator keeps a sample unless told to keep all


def draw(study: Study, values: "Values") -> dict[str, Figure]:
    """Name -> figure: a strip plot for each measure, a plot for each curve, a map for each two-way sweep."""
    figures = {}
    for measure in study.measures:
        word = re.sub(r"\W+", "_", measure)
        by_arm = {arm: values[arm][measure] for arm in study.arms if values[arm][measure]}
        if by_arm:
            figures[f"strip_{word}"] = strip(measure, by_arm)
        for sweep, grid in _grids(study, by_arm).items():
            figures[f"map_{sweep}_{word}"] = heat_map(measure, *grid)
    logged = [(run.arm, _logged(run)) for run in study.runs if study.curves and run.result]
    for scalar in study.curves:
        if histories := _histories(scalar, logged):
            word = re.sub(r"\W+", "_", scalar)
            figures[f"curve_{word}"] = curves(scalar, histories)
    return figures


def strip(measure: str, by_arm: dict[str, Series]) -> Figure:
    """Each seed a dot, each arm's mean with its 95 % interval."""
    figure = Figure(figsize=(1.5 + 1.1 * len(by_arm), 3.6), layout="constrained")
    axes = figure.subplots()
    for place, series in enumerate(by_arm.values()):
        values = [measured.value for measured in series.values()]
        shift = np.linspace(-0.12, 0.12, len(values)) if len(values) > 1 else [0.0]
        axes.plot(place + np.array(shift), values, "o", color="tab:blue", alpha=0.5, markersize=5)
        estimate = mean(series)
        if np.isfinite([estimate.low, estimate.high]).all():
            axes.plot([place + 0.25] * 2, [estimate.low, estimate.high], color="black", linewidth=1.5)
        axes.plot(place + 0.25, estimate.value, "_", color="black", markersize=12)
    axes.set_xticks(range(len(by_arm)), list(by_arm), rotation=30, ha="right")
    axes.set(ylabel=measure, xlim=(-0.5, len(by_arm) - 0.5))
    axes.grid(axis="y", alpha=0.3)
    return figure


def curves(scalar: str, histories: dict[str, dict[int, list[float]]]) -> Figure:
    """Mean over seeds by step, with Student's 95 % band where there are at least two."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for number, (arm, history) in enumerate(histories.items()):
        colour = colormaps["tab10"](number % 10)
        steps = sorted(history)
        axes.plot(steps, [np.mean(history[step]) for step in steps], label=arm, color=colour)
        banded = [step for step in steps if len(history[step]) > 1]
        if banded:
            low, high = zip(*(t_interval(np.array(history[step])) for step in banded), strict=True)
            axes.fill_between(banded, low, high, alpha=0.2, color=colour, linewidth=0)
    axes.set(xlabel="step", ylabel=scalar)
    axes.legend()
    return figure


def heat_map(measure: str, keys: list[str], rows: list, columns: list, means: np.ndarray) -> Figure:
    """Means of a two-way sweep."""
    figure = Figure(figsize=(2 + 0.9 * len(columns), 1.5 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(means, aspect="auto", origin="lower")
    for i, j in np.argwhere(np.isfinite(means)):
        axes.text(j, i, f"{means[i, j]:.3g}", ha="center", va="center", color="white", fontsize=8)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(range(len(columns)), columns)
    axes.set(ylabel=keys[0], xlabel=keys[1], title=measure)
    figure.colorbar(image)
    return figure


def _grids(study: Study, by_arm: dict[str, Series]) -> dict[str, tuple[list[str], list, list, np.ndarray]]:
    sweeps: dict[str, dict[str, dict]] = defaultdict(dict)
    for arm, (sweep, factors) in study.factors.items():
        if len(factors) == 2:
            sweeps[sweep][arm] = factors
    grids = {}
    for sweep, arms in sweeps.items():
        keys = list(next(iter(arms.values())))
        rows, columns = (list(dict.fromkeys(str(factors[key]) for factors in arms.values())) for key in keys)
        means = np.full((len(rows), len(columns)), np.nan)
        for arm, factors in arms.items():
            if arm in by_arm:
                means[rows.index(str(factors[keys[0]])), columns.index(str(factors[keys[1]]))] = mean(by_arm[arm]).value
        grids[sweep] = keys, rows, columns, means
    return grids


def _logged(run: Run) -> Logged:
    """What a run logged, read at most once."""
    path = run.folder / "members.jsonl"
    members = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    @cache
    def events() -> EventAccumulator:
        return EventAccumulator(str(run.folder), size_guidance=STEPS).Reload()

    def of(scalar: str) -> dict[int, list[float]]:
        if any(scalar in line for line in members):
            return {line["step"]: [x for x in line.get(scalar, []) if x is not None] for line in members}
        if scalar not in events().Tags()["scalars"]:
            return {}
        # By step, for a run that was broken off may have passed it twice
        return {event.step: [event.value] for event in events().Scalars(scalar)}

    return of


def _histories(scalar: str, runs: list[tuple[str, Logged]]) -> dict[str, dict[int, list[float]]]:
    """Arm -> step -> the scalar's values over seeds."""
    histories: dict[str, dict[int, list[float]]] = {}
    for arm, logged in runs:
        for step, values in logged(scalar).items():
            histories.setdefault(arm, defaultdict(list))[step] += values
    return histories
