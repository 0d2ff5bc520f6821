"""Seconds per seed and step of ensembles against one compiled run, on the interleaved and the modular task.

python benchmarks/ensembles.py [--members 8 32 64] [--json FILE]

Each step is forward, loss, backward and AdamW on batches that lie on the device: what the program costs, without the
loop around it. All are compiled, the single run too. Medians of `--repeats` timed windows of `--steps` steps each,
after warm-up; the spread is that of windows.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from lightning_modules.separability import Separability

TASKS = {
    "interleaved: V 4096, d 40, T 128, batch 64, bf16": {
        "sizes": {"vocab_size": 4096, "seq_len": 128, "width": 40, "depth": 1, "heads": 4}, "batch": 64
    },
    "modular: p 113, d 128, T 3, batch 512, bf16": {
        "sizes": {"vocab_size": 114, "seq_len": 3, "width": 128, "depth": 1, "heads": 4, "norm": "none"},
        "batch": 512,
    },
    "modular: p 113, d 128, T 3, full batch 3831, bf16": {
        "sizes": {"vocab_size": 114, "seq_len": 3, "width": 128, "depth": 1, "heads": 4, "norm": "none"},
        "batch": 3831,
    },
}  # fmt: skip


def make_step(task: dict, members: int, device: torch.device) -> Callable[[], None]:
    """A training step of that many members."""
    module = Separability(**task["sizes"], ensemble=members, seed=0).to(device)
    shape = (*([members] if members > 1 else []), task["batch"], task["sizes"]["seq_len"])
    tokens = torch.randint(task["sizes"]["vocab_size"] - 1, shape, device=device)
    labels = torch.randint(task["sizes"]["vocab_size"] - 1, shape, device=device)
    if shape[-1] == 3:
        labels[..., :2] = -100
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3, fused=device.type == "cuda")

    losses = torch.compile(module.losses)  # as `model.compile` does

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            value = losses(tokens, labels)[0].sum()
        value.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def seconds(step: Callable[[], None], steps: int, repeats: int, device: torch.device) -> list[float]:
    """Seconds a step, of each window."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(5):
        step()
    windows = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        windows.append((time.perf_counter() - began) / steps)
    return windows


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--members", nargs="+", type=int, default=[8, 32, 64])
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rows = []
    print(f"| task ({name}) | S | ms a step | spread | peak GiB | ms a seed and step | against one compiled run |")
    print("|---|---|---|---|---|---|---|")
    for task_name, task in TASKS.items():
        single = None
        for members in [1, *options.members]:
            torch.compiler.reset()
            if device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            windows = seconds(make_step(task, members, device), options.steps, options.repeats, device)
            median, spread = 1e3 * statistics.median(windows), 1e3 * (max(windows) - min(windows))
            single = median if members == 1 else single
            peak = torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else float("nan")
            gain = single * members / median
            rows.append({"task": task_name, "members": members, "ms": median, "spread_ms": spread})
            rows[-1] |= {"peak_gib": peak, "gain": gain}
            cells = [
                task_name,
                str(members),
                f"{median:.2f}",
                f"{spread:.2f}",
                f"{peak:.1f}",
                f"{median / members:.3f}",
            ]
            print(f"| {' | '.join(cells)} | {gain:.1f} |", flush=True)
            if options.json:
                told = {"device": name, "torch": torch.__version__, "rows": rows}
                options.json.write_text(json.dumps(told, indent=2) + "\n")


if __name__ == "__main__":
    main()
