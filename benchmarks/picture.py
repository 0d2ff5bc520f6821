"""Draw TensorBoard curves of telepathy runs as one SVG picture.

python benchmarks/picture.py assets/telepathy.svg runs/telepathy_v15/<run> runs/telepathy_v16/<run>
"""

import argparse
from pathlib import Path

from matplotlib import rcParams
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

PANELS = {
    "train/lm": "cross-entropy of the answer, training",
    "quick_eval/accuracy": "held-out accuracy (quick_eval, n = 64)",
    "diversity/cosine": "cosine between soft tokens of different inputs",
    "quick_eval/entity_object": "objects of the question in the answer",
}


def main() -> None:
    """Draw the panels for the runs on the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="the SVG file to write")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    args = parser.parse_args()
    rcParams["svg.hashsalt"] = "crosstalk"  # the same runs give the same file
    figure = Figure(figsize=(10, 6), layout="constrained")
    for axes, (tag, title) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for run in args.runs:
            events = EventAccumulator(str(run)).Reload()
            if tag in events.Tags()["scalars"]:
                points = events.Scalars(tag)
                steps, values = [p.step for p in points], [p.value for p in points]
                low, high = f"{tag}_low", f"{tag}_high"
                line = axes.plot(steps, values, marker="o" if low in events.Tags()["scalars"] else "", label=run.name)
                if low in events.Tags()["scalars"]:
                    band = [[p.value for p in events.Scalars(end)] for end in (low, high)]
                    axes.fill_between(steps, *band, alpha=0.2, color=line[0].get_color())
        axes.set(title=title, xlabel="step", ylim=(0, None))
        axes.legend()
    figure.savefig(args.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
