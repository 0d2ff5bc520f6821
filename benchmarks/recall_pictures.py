"""Draw and print recall against the size of the state, beside the curves of Zoology, from the reports of studies.

python benchmarks/recall_pictures.py assets/recall_mqar.svg studies/results/recall_{mqar,rates,moments,warmup}.json

Of runs that differ in the learning rate, the warm-up and AdamW's second beta alone, the best counts. In the published
curves it is the best of four learning rates.
"""

import argparse
import itertools
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.figure import Figure

MEASURE = "test/accuracy_by_group"
LAYERS, HEADS, WINDOW, LONGEST = 2, 2, 16, 1024  # of the study's arms with two blocks
BYTES = 4  # of a number
SIZES: Mapping[str, Callable[[int], int]] = {  # series -> width -> bytes that a model carries to the next position
    "gated_delta": lambda width: BYTES * width**2,
    "two_blocks": lambda width: BYTES * LAYERS * HEADS * (width // HEADS) ** 2,
    "window": lambda width: BYTES * LAYERS * 2 * WINDOW * width,
    "attention": lambda width: BYTES * LAYERS * 2 * LONGEST * width,
}
LABELS = {
    "gated_delta": "gated delta rule",
    "two_blocks": "gated delta rule, two blocks of two heads",
    "window": f"attention to {WINDOW} positions",
    "attention": "attention to all positions",
}
RATES = {"rate_1": "gated_delta", "rate_3": "gated_delta"}  # arms of the other studies -> their series
# Read off the figure of the repository that accompanies "Zoology" (Arora et al. 2024, arXiv:2312.04927), which counts
# bytes. Its models of widths 64, 128 and 256 have one block of the mixer behind a block of a convolution, and the gated
# delta rule has values twice as wide as keys, so that its states are as large as those of the study at the same width.
PUBLISHED = {
    "gated delta rule": [(1.7e4, 0.89), (6.6e4, 0.988), (2.6e5, 0.995)],
    "delta rule": [(9e3, 0.79), (3.4e4, 0.963), (1.3e5, 0.995)],
    "Mamba-2": [(8e3, 0.52), (1e5, 0.84)],
}

Point = tuple[int, int, Mapping[str, Any]]  # width, size and estimate


def points(reports: Iterable[Mapping[str, Any]]) -> dict[str, list[Point]]:
    """Return the best arm of each series and width that has been tested, by width, from the arms of each report."""
    found: dict[str, dict[int, Mapping[str, Any]]] = {series: {} for series in SIZES}
    for arm, data in itertools.chain.from_iterable(arms.items() for arms in reports):
        name, _, width = arm.rpartition("_")
        own, estimate = found.get(RATES.get(name, name)), data["estimates"].get(MEASURE)
        if own is not None and estimate and estimate["value"] is not None:
            own[int(width)] = max(own.get(int(width), estimate), estimate, key=lambda one: one["value"])
    return {
        series: [(width, SIZES[series](width), own[width]) for width in sorted(own)]
        for series, own in found.items()
        if own
    }


def picture(series: Mapping[str, list[Point]]) -> Figure:
    """Draw accuracy against the size of the state: lines for the study, dashes for published curves."""
    figure = Figure(figsize=(7, 4.6), layout="constrained")
    axes = figure.subplots()
    colours = {name: f"C{number}" for number, name in enumerate(SIZES)}  # also if not all have been run
    for name, own in series.items():
        sizes, values = [size for _, size, _ in own], [estimate["value"] for *_, estimate in own]
        axes.plot(sizes, values, "o-", color=colours[name], label=LABELS[name])
        for width, size, estimate in own:
            axes.annotate(
                str(width), (size, estimate["value"]), xytext=(4, -12), textcoords="offset points", fontsize=8
            )
    for number, (label, curve) in enumerate(PUBLISHED.items()):
        colour = colours["gated_delta"] if label == LABELS["gated_delta"] else f"C{number + len(SIZES)}"
        axes.plot(*zip(*curve, strict=True), "x--", color=colour, alpha=0.6, label=f"{label}, published")
    axes.set(xscale="log", xlabel="bytes in the state", ylabel="accuracy, mean of seven test sets", ylim=(0, 1.03))
    axes.grid(alpha=0.3)
    axes.legend()
    return figure


def table(series: Mapping[str, list[Point]]) -> str:
    """Return the points as a markdown table."""
    rows = [
        f"| {LABELS[name]} | {width} | {size} | {estimate['value']:.3f} |"
        for name, own in series.items()
        for width, size, estimate in own
    ]
    rows += [
        f"| {label}, published | - | {size:.2g} | {value} |" for label, own in PUBLISHED.items() for size, value in own
    ]
    return "\n".join(["| model | width | bytes in the state | accuracy |", "|---|---|---|---|", *rows])


def main() -> None:
    """Read the reports, write the picture and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="the SVG file to write")
    parser.add_argument("reports", type=Path, nargs="+", help="report.json of each study")
    options = parser.parse_args()
    rcParams["svg.hashsalt"] = "crosstalk"  # the same report gives the same file
    series = points(json.loads(path.read_text())["arms"] for path in options.reports)
    picture(series).savefig(options.picture, metadata={"Date": None})
    print(table(series))


if __name__ == "__main__":
    main()
