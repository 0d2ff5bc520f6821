"""Draw the ladder of versions or the compression curve from a study's report, or a run's soft tokens over training.

python benchmarks/telepathy_pictures.py ladder assets/telepathy_ladder.svg runs/studies/telepathy_ladder/report.json
python benchmarks/telepathy_pictures.py compression assets/telepathy_compression.svg \\
    runs/studies/telepathy_compression/report.json
python benchmarks/telepathy_pictures.py tokens assets/telepathy_tokens.svg runs/telepathy_v15/<run>
"""

import argparse
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lightning_modules.telepathy.figures import embedding_map

RUNGS = {"accuracy": "accuracy", "entity_transfer": "entity transfer e*", "distinct": "different answers"}
SOUND, FLAWED, ONE = "C0", "C3", "C7"
LINES = {"text_bits": "text", "gzip_bits": "gzip", "gzip_set_bits": "gzip of all"}
KEPT = 0.95  # of V16's accuracy
PANELS = 4  # of soft tokens over training
Arms = Mapping[str, Mapping[str, Any]]  # arm -> measure -> estimate


def read(path: Path) -> Arms:
    """Return the estimates of a study's report: arm -> measure without `test/` -> value, low and high."""
    arms = json.loads(path.read_text())["arms"]
    return {
        arm: {
            measure.removeprefix("test/"): estimate
            for measure, estimate in data["estimates"].items()
            if estimate["value"] is not None
        }
        for arm, data in arms.items()
    }


def rung_of(arm: str) -> tuple[str, str]:
    """Return the version of an arm and what it is: `sound`, `flaws` for all of them, or the name of other settings."""
    version, _, rest = arm.partition("_")
    return version.upper() if version in ("lm", "vq", "fsq") else version.capitalize(), rest or "sound"


def ladder(arms: Arms) -> Figure:
    """Draw each version without its flaws, with all of them, and with other settings, with 95 % intervals."""
    rungs = list(dict.fromkeys(rung_of(arm)[0] for arm in arms))
    figure = Figure(figsize=(11, 1.2 + 0.34 * len(rungs)), layout="constrained")
    for axes, (measure, title) in zip(figure.subplots(1, len(RUNGS), sharey=True), RUNGS.items(), strict=True):
        for arm, estimates in arms.items():
            if measure not in estimates:
                continue
            rung, kind = rung_of(arm)
            colour = {"sound": SOUND, "flaws": FLAWED}.get(kind, ONE)
            place = rungs.index(rung) + {"sound": -0.15, "flaws": 0.15}.get(kind, 0.0)
            _point(axes, estimates[measure], place, colour, "o" if kind in ("sound", "flaws") else "x")
        axes.set(title=title, xlim=(-0.03, 1.03), ylim=(len(rungs) - 0.5, -0.5))
        axes.set_yticks(range(len(rungs)), rungs)
        axes.grid(alpha=0.3)
    kinds = {"sound": (SOUND, "o"), "all flaws of the notes": (FLAWED, "o"), "other settings": (ONE, "x")}
    for label, (colour, marker) in kinds.items():
        axes.plot([], [], marker, color=colour, label=label)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def _point(axes: Axes, estimate: Mapping[str, float | None], place: float, colour: str, marker: str) -> None:
    value, low, high = (estimate[key] for key in ("value", "low", "high"))
    assert value is not None  # see `read`
    ends = None if low is None or high is None else [[max(value - low, 0)], [max(high - value, 0)]]
    axes.errorbar([value], [place], xerr=ends, fmt=marker, color=colour, markersize=5, elinewidth=1, capsize=2)


def compression(arms: Arms) -> Figure:
    """Draw accuracy and e* against bits per question, and accuracy against milliseconds.

    Continuous soft tokens have 16 bits per number; codes have the bits of an entropy coder.
    """
    figure = Figure(figsize=(12, 4.4), layout="constrained")
    panels = figure.subplots(1, 3)
    for axes, (across, up) in zip(
        panels, [("bits", "accuracy"), ("bits", "entity_transfer"), ("soft_ms", "accuracy")], strict=True
    ):
        for number, series in enumerate(("k", "vq", "fsq")):
            sizes = sorted((int(found[1]), arm) for arm in arms if (found := re.fullmatch(rf"{series}_(\d+)", arm)))
            points = [(size, _across(arms[arm], across), arms[arm][up]["value"]) for size, arm in sizes if arms[arm]]
            label = {"k": "soft tokens", "vq": "VQ codes", "fsq": "FSQ codes"}[series]
            axes.plot([x for _, x, _ in points], [y for *_, y in points], "o-", color=f"C{number}", label=label)
            for size, x, y in points:
                axes.annotate(str(size), (x, y), xytext=(3, 4), textcoords="offset points", fontsize=8)
        if "token" in arms:
            token = arms["token"]
            axes.plot([_across(token, across)], [token[up]["value"]], "k*", markersize=11, label="V16")
            axes.axhline(KEPT * token[up]["value"], color="black", linewidth=0.8, linestyle=":")
        _text(axes, arms, across)
        axes.set(ylim=(-0.03, 1.03), ylabel=RUNGS[up])
        if across == "bits":
            axes.set(xscale="log", xlabel="bits per question")
        else:
            axes.set(xlim=(0, None), xlabel="milliseconds per question")
        axes.grid(alpha=0.3)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _across(estimates: Mapping[str, Any], name: str) -> float:
    """Return an arm's place along the axis: codes have fewer bits than their numbers."""
    if name == "bits":
        name = "code_bits" if "code_bits" in estimates else "soft_bits"
    return float(estimates[name]["value"])


def _text(axes: Axes, arms: Arms, across: str) -> None:
    """Mark what the text takes; it is the same for every arm but for the time."""
    marks = LINES if across == "bits" else {"text_ms": "text"}
    for number, (measure, label) in enumerate(marks.items()):
        known = [estimates[measure]["value"] for estimates in arms.values() if measure in estimates]
        if known:
            x = math.fsum(known) / len(known)
            axes.axvline(x, color="grey", linewidth=0.8, linestyle="--")
            axes.text(x, 0.02 + 0.06 * number, label, fontsize=8, rotation=90, va="bottom", ha="right", color="grey")


def tokens(run: Path) -> Figure:
    """Draw soft tokens among the target's embeddings at up to four steps of a run with the callback `SoftTokenMap`."""
    files = sorted((run / "soft_tokens").glob("*.json"), key=lambda path: int(path.stem))
    if not files:
        raise SystemExit(f"{run} has no soft_tokens/<step>.json: add SoftTokenMap to its callbacks")
    count = min(PANELS, len(files))
    places = [round(number * (len(files) - 1) / max(count - 1, 1)) for number in range(count)]
    return embedding_map([json.loads(files[place].read_text()) for place in places])


def main() -> None:
    """Read the report or the run, draw, and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=("ladder", "compression", "tokens"), help="what to draw")
    parser.add_argument("picture", type=Path, help="the SVG file to write")
    parser.add_argument(
        "given", type=Path, metavar="report", help="the study's report.json; for tokens the run's folder"
    )
    options = parser.parse_args()
    rcParams["svg.hashsalt"] = "crosstalk"  # the same data give the same file
    match options.kind:
        case "ladder":
            figure = ladder(read(options.given))
        case "compression":
            figure = compression(read(options.given))
        case _:
            figure = tokens(options.given)
    figure.savefig(options.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
