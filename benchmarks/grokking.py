"""Draw the held-out accuracy of runs of studies/grokking.yaml, and print when each arm reached high accuracy.

python benchmarks/grokking.py reference=FILE no_decay=FILE [--out assets/grokking.svg]

FILE is the `members.jsonl` of a run of the arm, in `runs/studies/grokking/runs/<arm>/<run>/`.
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
    """Read a run: `step` [N] and accuracies [N, S] of N validations and S seeds; NaN where the file has null."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    curves = {name: np.array([line[name] for line in lines], dtype=float) for name in (HELD_OUT, TRAIN)}
    return curves | {"step": np.array([line["step"] for line in lines])}


def first_steps(steps_N: np.ndarray, values_NS: np.ndarray) -> np.ndarray:
    """Return, for each seed, the first step at which the value is at least `REACHED`; NaN if there is none."""
    reached_NS = values_NS >= REACHED
    return np.where(reached_NS.any(0), steps_N[reached_NS.argmax(0)], np.nan)


def row(arm: str, run: dict[str, np.ndarray]) -> list[str]:
    """Return an arm's row of the table; medians and ranges are over the seeds that reached the accuracy."""
    cells = [arm, str(run[HELD_OUT].shape[1])]
    for name in (TRAIN, HELD_OUT):
        first_S = first_steps(run["step"], run[name])
        steps = first_S[~np.isnan(first_S)]
        summary = f"{np.median(steps):g} ({steps.min():g} to {steps.max():g})" if len(steps) else "never"
        cells += [summary, f"{len(steps)} of {len(first_S)}"]
    return [*cells, str(run["step"][-1]), f"{np.nanmean(run[HELD_OUT][-1]):.3f}"]


def table(runs: dict[str, dict[str, np.ndarray]]) -> str:
    """Return the markdown table, one row per arm."""
    heads = ["arm", "seeds", f"first step with training accuracy >= {REACHED}", "seeds that reach it"]
    heads += [f"first step with held-out accuracy >= {REACHED}", "seeds that reach it"]
    heads += ["last step", "held-out accuracy at that step"]
    rows = [heads, ["---"] * len(heads), *(row(arm, run) for arm, run in runs.items())]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in rows)


def draw(runs: dict[str, dict[str, np.ndarray]]) -> Figure:
    """Draw the held-out accuracy as one thin line per seed, and the mean train accuracy over seeds as a dashed line."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for (arm, run), colour in zip(runs.items(), COLOURS, strict=False):
        name = NAMES.get(arm, arm)
        held_out = axes.plot(run["step"], run[HELD_OUT], color=colour, linewidth=0.7, alpha=0.7)
        held_out[0].set_label(f"{name}, held-out, one line per seed")
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
    rcParams["svg.hashsalt"] = "crosstalk"  # the same runs give the same file
    draw(runs).savefig(args.out, metadata={"Date": None})
    print(table(runs))


if __name__ == "__main__":
    main()
