"""What checkpoints cost a run: how many, how large, and their share of the time of training.

    python benchmarks/checkpoint_cost.py configs/telepathy_v15.yaml [--steps 300] [--minutes 5]

Prints one row. The time includes the flush to the disk.
"""

import argparse
import time
from typing import Any

from callbacks.last_checkpoint import LAST, LastCheckpoint
from main import main


class Timed:
    """Times every call of `LastCheckpoint.save` that writes."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.mebibytes = 0.0
        original = LastCheckpoint.save

        def save(callback: LastCheckpoint, trainer: Any) -> None:
            before, began = callback._saved_step, time.perf_counter()
            original(callback, trainer)
            if callback._saved_step != before:
                self.seconds.append(time.perf_counter() - began)
                self.mebibytes = (callback._folder / LAST).stat().st_size / 2**20

        setattr(LastCheckpoint, "save", save)  # noqa: B010  (mypy forbids to assign to a method)


def run() -> None:
    """Train, and print the row."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--steps", type=int, help="steps of training; those of the config by default")
    parser.add_argument("--minutes", type=float, default=5.0, help="time between two checkpoints")
    options = parser.parse_args()
    timed = Timed()
    line = ["fit", "--config", options.config, "--test_after_fit=false", f"--checkpoint_minutes={options.minutes}"]
    line += [f"--trainer.max_steps={options.steps}"] if options.steps else []
    cli = main(line)
    assert cli is not None  # it is one run
    fit, total = cli.record.record["seconds"]["fit"], sum(timed.seconds)
    print("| config | fit, s | checkpoints | MiB each | longest, s | all, s | share |")
    print("|---|---|---|---|---|---|---|")
    figures = f"{fit:.1f} | {len(timed.seconds)} | {timed.mebibytes:.1f} | {max(timed.seconds):.3f} | {total:.2f}"
    print(f"| {options.config} | {figures} | {total / fit:.2%} |")


if __name__ == "__main__":
    run()
