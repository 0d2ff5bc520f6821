"""Draw held-out accuracy over the steps of runs of studies/grokking.yaml, and print when each arm got where.

python benchmarks/grokking.py reference=FILE no_decay=FILE [--out assets/grokking.svg]

FILE is the `members.jsonl` of an arm's run, in `runs/studies/grokking/runs/<arm>/<run>/`.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from matplotlib import rcParams
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator

HELD_OUT, TRAIN = "validation/accuracy", "train/accuracy"
REACHED = 0.99
NAMES = {"reference": "weight decay 1", "no_decay": "no weight decay"}
TICKS = [digit * 10**power for power in range(6) for digit in (1, 2, 5)]
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")


def read(path: Path) -> dict[str, np.ndarray]:
    """Read a run: `step` [N], and accuracies [N, seeds]; an accuracy that is null is NaN."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    curves = {name: np.array([line[name] for line in lines], dtype=float) for name in (HELD_OUT, TRAIN)}
    return curves | {"step": np.array([line["step"] for line in lines])}


def first_steps(steps_N: np.ndarray, values_NS: np.ndarray) -> np.ndarray:
    """Each seed's first validation at which the value is at least `REACHED`; NaN if there is none."""
    reached_NS = values_NS >= REACHED
    return np.where(reached_NS.any(0), steps_N[reached_NS.argmax(0)], np.nan)


def row(arm: str, run: dict[str, np.ndarray]) -> list[str]:
    """Make an arm's row of the table; medians and ranges are over the seeds that got there."""
    cells = [arm, str(run[HELD_OUT].shape[1])]
    for name in (TRAIN, HELD_OUT):
        first_S = first_steps(run["step"], run[name])
        there = first_S[~np.isnan(first_S)]
        between = f"{np.median(there):g} ({there.min():g} to {there.max():g})" if len(there) else "never"
        cells += [between, f"{len(there)} of {len(first_S)}"]
    return [*cells, str(run["step"][-1]), f"{np.nanmean(run[HELD_OUT][-1]):.3f}"]


def table(runs: dict[str, dict[str, np.ndarray]]) -> str:
    """Make the markdown table, a row for each arm."""
    heads = ["arm", "seeds", f"first step with train >= {REACHED}", "seeds there"]
    heads += [f"first step with held-out >= {REACHED}", "seeds there", "last step seen", "held-out accuracy there"]
    rows = [heads, ["---"] * len(heads), *(row(arm, run) for arm, run in runs.items())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def draw(runs: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Draw a thin line a seed for held-out accuracy, and the mean over seeds of train accuracy, dashed."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for (arm, run), colour in zip(runs.items(), COLOURS, strict=False):
        name = NAMES.get(arm, arm)
        held_out = axes.plot(run["step"], run[HELD_OUT], color=colour, linewidth=0.7, alpha=0.7)
        held_out[0].set_label(f"{name}, held-out, a line a seed")
        axes.plot(run["step"], run[TRAIN].mean(1), color=colour, dashes=(4, 3), label=f"{name}, train, mean")
    axes.set(xscale="log", xlabel="step", ylabel="accuracy", ylim=(-0.02, 1.04))
    low, high = axes.get_xlim()
    axes.set_xticks([tick for tick in TICKS if low <= tick <= high], minor=False)
    axes.xaxis.set_major_formatter("{x:.0f}")
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend(loc="center left", fontsize="small")
    return figure


def main() -> None:
    """Draw the picture and print the table of the runs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="ARM=FILE", help="an arm and its members.jsonl")
    parser.add_argument("--out", type=Path, default=Path("assets/grokking.svg"), help="the SVG file to write")
    args = parser.parse_args()
    if wrong := [text for text in args.runs if "=" not in text]:
        parser.error(f"{wrong[0]} is not of the form ARM=FILE")
    if len(args.runs) > len(COLOURS):
        parser.error(f"there are colours for {len(COLOURS)} arms, not for {len(args.runs)}")
    runs = {arm: read(Path(path)) for arm, path in (text.split("=", 1) for text in args.runs)}
    rcParams["svg.hashsalt"] = "crosstalk"  # the same picture from the same runs
    draw(runs).savefig(args.out, metadata={"Date": None})
    print(table(runs))


if __name__ == "__main__":
    main()
