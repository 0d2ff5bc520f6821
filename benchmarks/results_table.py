"""Print the results of telepathy runs as a markdown table.

python benchmarks/results_table.py benchmarks/results/telepathy_*.json
"""

import argparse
import json
from pathlib import Path

COLUMNS = {
    "accuracy": "accuracy",
    "text_accuracy": "the target on text",
    "relative_accuracy": "relative",
    "entity_transfer": "e*",
    "distinct": "distinct",
    "source_specificity": "specificity (nats)",
    "recovery": "recovery",
}


def row(path: Path) -> list[str]:
    """Return the cells of one run: name, device, steps, seconds of the fit, each measure with its interval, and n."""
    record = json.loads(path.read_text())
    name = path.stem if path.stem != "results" else path.parent.name
    device = "H200" if "H200" in record["hardware"]["device"] else "CPU"
    cells = [name, device, str(record["steps"]), f"{record['seconds'].get('fit', 0):.0f}"]
    for measure in COLUMNS:
        value = record["metrics"].get(f"test/{measure}")
        interval = record["intervals"].get(f"test/{measure}")
        between = f" [{interval[0]:.3f}, {interval[1]:.3f}]" if interval else ""
        cells.append("-" if value is None else f"{value:.3f}{between}")
    return [*cells, str(record["n"].get("test/accuracy", "-"))]


def main() -> None:
    """Read the files and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="results.json files")
    header = ["run", "on", "steps", "fit (s)", *COLUMNS.values(), "n"]
    print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}")
    for path in parser.parse_args().files:
        print(f"| {' | '.join(row(path))} |")


if __name__ == "__main__":
    main()
