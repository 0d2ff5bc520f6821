"""Time the start of the command line: the ledger, two helps, and a fit until its first optimizer step.

python benchmarks/startup.py [--repeats 5] [--json FILE]

Each command runs in a new process, from the root of the checkout, `--repeats` times after one run that fills the disk
cache. The table has the median, the fastest and the slowest wall time. The fit is stopped after its first optimizer
step and leaves nothing behind.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

from lightning import Callback, LightningModule, Trainer

ROOT = Path(__file__).parents[1]
CONFIG = "configs/separability_interleaved.yaml"
MARK = "first optimizer step"
COMMANDS = {
    "python main.py ledger": ["ledger"],
    "python main.py --help": ["--help"],
    "python main.py fit --help": ["fit", "--help"],
}


class AnnounceFirstStep(Callback):
    """Prints a line after the first optimizer step; the fit that is timed has it in its config."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: object, batch: object, batch_idx: int
    ) -> None:
        """Print the line."""
        if trainer.global_step == 1:
            print(MARK, flush=True)


def command_seconds(arguments: list[str]) -> float:
    """Return the wall time of a command, from its start to its end."""
    start = time.perf_counter()
    finished = subprocess.run([sys.executable, "main.py", *arguments], cwd=ROOT, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if finished.returncode:
        sys.exit(f"main.py {' '.join(arguments)} ended with code {finished.returncode}:\n{finished.stderr[-2000:]}")
    return seconds


def first_step_seconds() -> float:
    """Return the wall time of a fit, from its start to its first optimizer step."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = ["fit", "--config", CONFIG, "--trainer.default_root_dir", f"{folder}/run"]
        arguments += ["--trainer.callbacks+=benchmarks.startup.AnnounceFirstStep"]
        log, start = Path(folder, "log.txt"), time.perf_counter()
        with (
            log.open("w") as errors,
            subprocess.Popen(
                [sys.executable, "main.py", *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=errors, text=True
            ) as fit,
        ):
            assert fit.stdout is not None  # it is a pipe
            reached = any(MARK in line for line in fit.stdout)
            seconds = time.perf_counter() - start
            fit.kill()
        if not reached:
            sys.exit(f"the fit ended before its first optimizer step:\n{log.read_text()[-2000:]}")
    return seconds


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5, help="runs per command (default: 5)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the times to a file")
    options = parser.parse_args()
    measured: dict[str, Callable[[], float]] = {
        name: partial(command_seconds, arguments) for name, arguments in COMMANDS.items()
    }
    measured[f"fit with {CONFIG}, to its first optimizer step"] = first_step_seconds
    rows: dict[str, list[float]] = {}
    print("| command | median (s) | fastest | slowest |\n|---|---|---|---|")
    for name, seconds in measured.items():
        seconds()
        rows[name] = [seconds() for _ in range(options.repeats)]
        cells = [statistics.median(rows[name]), min(rows[name]), max(rows[name])]
        print(f"| {name} | {' | '.join(f'{cell:.2f}' for cell in cells)} |", flush=True)
    if options.json:
        options.json.write_text(json.dumps({"python": sys.version.split()[0], "seconds": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
