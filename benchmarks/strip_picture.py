"""Draw a measure of each arm of one or several studies: a dot for each seed, and the mean with its 95 % interval.

python benchmarks/strip_picture.py assets/phase_recall.svg test/accuracy studies/results/phase_recall.json \
    studies/results/phase_recall_steps.json

An arm of a later report whose name an earlier one has gets the name of its study behind it.
"""

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from matplotlib import rc_context, rcParams

from studies.engine.figures import STYLE, strip
from studies.engine.statistics import Estimate, Measured, Series


def by_arm(reports: Iterable[Mapping[str, Any]], measure: str) -> dict[str, tuple[Series, Estimate]]:
    """Return the values of a measure by seed and their mean for each arm; arms without values are left out."""
    found: dict[str, tuple[Series, Estimate]] = {}
    for report in reports:
        for arm, data in report["arms"].items():
            series = {int(seed): Measured(value) for seed, value in data["values"].get(measure, {}).items()}
            if series:
                mean = data["estimates"][measure]
                low, high = (math.nan if mean[end] is None else mean[end] for end in ("low", "high"))
                name = f"{arm}, {report['study']}" if arm in found else arm
                found[name] = series, Estimate(mean["value"], low, high, mean["seeds"])
    return found


def main() -> None:
    """Read the reports and write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path, help="the SVG file to write")
    parser.add_argument("measure", help="such as test/accuracy")
    parser.add_argument("reports", type=Path, nargs="+", help="report.json of the studies")
    options = parser.parse_args()
    rcParams["svg.hashsalt"] = "crosstalk"  # the same reports give the same file
    arms = by_arm((json.loads(path.read_text()) for path in options.reports), options.measure)
    if not arms:
        parser.error(f"no report has values of {options.measure}")
    series = {arm: own for arm, (own, _) in arms.items()}
    means = {arm: mean for arm, (_, mean) in arms.items()}
    with rc_context(STYLE):
        strip(options.measure, series, means).savefig(options.picture, metadata={"Date": None})


if __name__ == "__main__":
    main()
