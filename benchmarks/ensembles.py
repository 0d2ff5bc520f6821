"""Time ensembles against one compiled run, in seconds per seed and step, on the interleaved and the modular task.

python benchmarks/ensembles.py [--members 8 32 64] [--json FILE]

A step is forward, loss, backward and AdamW on batches that are already on the device, without the training loop around
it. All programs are compiled, the single run included. Each figure is the median over `--repeats` timed windows of
`--steps` steps after a warm-up; the spread is the difference between the slowest and the fastest window.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from datamodules.batch import IGNORE
from lightning_modules.separability import Separability


@dataclass(frozen=True)
class Task:
    """The sizes of a model and of its batches.

    Attributes:
        sizes: Arguments of `Separability`.
        batch: Rows per step and ensemble member.
    """

    sizes: dict[str, Any]
    batch: int


MODULAR = {"vocab_size": 114, "seq_len": 3, "width": 128, "depth": 1, "heads": 4, "norm": "none"}
TASKS = {
    "interleaved: V 4096, d 40, T 128, batch 64, bf16": Task(
        {"vocab_size": 4096, "seq_len": 128, "width": 40, "depth": 1, "heads": 4}, 64
    ),
    "modular: p 113, d 128, T 3, batch 512, bf16": Task(MODULAR, 512),
    "modular: p 113, d 128, T 3, full batch 3831, bf16": Task(MODULAR, 3831),
}
COLUMNS = ("S", "ms per step", "spread", "peak GiB", "ms per seed and step", "speed-up over one compiled run")


def make_step(task: Task, members: int, device: torch.device) -> Callable[[], None]:
    """Return a training step of an ensemble with random weights and random tokens."""
    module = Separability(**task.sizes, ensemble=members, seed=0).to(device)
    shape = (*([members] if members > 1 else []), task.batch, task.sizes["seq_len"])
    tokens = torch.randint(task.sizes["vocab_size"] - 1, shape, device=device)
    labels = torch.randint(task.sizes["vocab_size"] - 1, shape, device=device)
    if shape[-1] == 3:
        labels[..., :2] = IGNORE
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=device.type == "cuda")
    losses = torch.compile(module.losses)  # as `model.compile` does

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = losses(tokens, labels)[0].sum()
        torch.autograd.backward(loss)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], None], steps: int, repeats: int, device: torch.device) -> list[float]:
    """Return the seconds per step of each window."""
    for _ in range(5):
        step()
    windows = []
    for _ in range(repeats):
        synchronize(device)
        start = time.perf_counter()
        for _ in range(steps):
            step()
        synchronize(device)
        windows.append((time.perf_counter() - start) / steps)
    return windows


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(task: Task, members: int, steps: int, repeats: int, device: torch.device) -> dict[str, float]:
    """Return the times in milliseconds and the peak memory in GiB of an ensemble."""
    torch.compiler.reset()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    windows = seconds(make_step(task, members, device), steps, repeats, device)
    peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
    return {
        "ms": 1e3 * statistics.median(windows),
        "spread_ms": 1e3 * (max(windows) - min(windows)),
        "peak_gib": peak,
    }


def main() -> None:
    """Measure every task and ensemble size, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", nargs="+", type=int, default=[8, 32, 64], help="ensemble sizes")
    parser.add_argument("--steps", type=int, default=30, help="steps per window")
    parser.add_argument("--repeats", type=int, default=7, help="windows")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rows: list[dict[str, Any]] = []
    print(f"| task ({name}) | {' | '.join(COLUMNS)} |\n|{'---|' * (len(COLUMNS) + 1)}")
    for task_name, task in TASKS.items():
        single = 0.0  # ms per step of one seed
        for members in [1, *options.members]:
            row = measure(task, members, options.steps, options.repeats, device)
            single = row["ms"] if members == 1 else single
            rows.append({"task": task_name, "members": members, **row, "gain": single * members / row["ms"]})
            cells = [task_name, str(members), f"{row['ms']:.2f}", f"{row['spread_ms']:.2f}", f"{row['peak_gib']:.1f}"]
            cells += [f"{row['ms'] / members:.3f}", f"{rows[-1]['gain']:.1f}"]
            print(f"| {' | '.join(cells)} |", flush=True)
            if options.json:
                figures = {"device": name, "torch": torch.__version__, "rows": rows}
                options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
