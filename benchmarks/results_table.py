"""Print the results of telepathy runs as a markdown table.

python benchmarks/results_table.py benchmarks/results/telepathy_*.json
python benchmarks/results_table.py --set passkey benchmarks/results/telepathy_real_pair_h200.json
"""

import argparse
import json
from pathlib import Path

COLUMNS = {
    "accuracy": "accuracy",
    "text_accuracy": "the target on text",
    "text_prefix_accuracy": "with a prefix",
    "zero_accuracy": "zero message",
    "shuffled_accuracy": "shuffled",
    "relative_accuracy": "relative",
    "entity_transfer": "e*",
    "distinct": "distinct",
    "source_specificity": "specificity (nats)",
    "recovery": "recovery",
}


def row(path: Path, name_of_set: str) -> list[str]:
    """Return the cells of one run: name, device, steps, seconds of the fit, each measure with its interval, and n."""
    record = json.loads(path.read_text())
    name = path.stem if path.stem != "results" else path.parent.name
    device = "H200" if "H200" in record["hardware"]["device"] else "CPU"
    cells = [name, device, str(record["steps"]), f"{record['seconds'].get('fit', 0):.0f}"]
    for measure in COLUMNS:
        value = record["metrics"].get(f"{name_of_set}/{measure}")
        interval = record["intervals"].get(f"{name_of_set}/{measure}")
        between = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        cells.append("-" if value is None else f"{value:.3f}{between}")
    return [*cells, str(record["n"].get(f"{name_of_set}/accuracy", "-"))]


def main() -> None:
    """Read the files and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="results.json files")
    parser.add_argument("--set", default="test", help="the test set; `test` unless given")
    options = parser.parse_args()
    header = ["run", "on", "steps", "fit (s)", *COLUMNS.values(), "n"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for path in options.files:
        print(f"| {' | '.join(row(path, options.set))} |")


if __name__ == "__main__":
    main()
