"""Milliseconds of a training step of configs/separability_interleaved.yaml: forward, loss, backward and AdamW.

python benchmarks/decoder_step.py [--steps 30] [--repeats 9] [--json FILE]

The batch lies on the device already. `default` is the config as it is (eager, fp32); on a GPU `compiled` is
`model.compile` under bf16-mixed. Medians of `--repeats` timed windows of `--steps` steps each, after warm-up; the
spread is the largest window less the smallest.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch

from lightning_modules.separability import Separability

VOCAB, LENGTH, BATCH = 4096, 128, 64
WARM_UP = 5


def make_step(compiled: bool, device: torch.device) -> Callable[[], None]:
    """Return a function that takes one training step."""
    module = Separability(VOCAB, LENGTH, width=40, depth=1, heads=4, seed=0).to(device)
    tokens, labels = torch.randint(VOCAB, (2, BATCH, LENGTH), device=device)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3, betas=(0.9, 0.98), weight_decay=0.01)
    losses = torch.compile(module.losses) if compiled else module.losses

    def precision() -> AbstractContextManager[object]:
        return torch.autocast(device.type, torch.bfloat16) if compiled else nullcontext()

    def step() -> None:
        with precision():
            loss = losses(tokens, labels)[0].sum()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def milliseconds(step: Callable[[], None], steps: int, repeats: int, device: torch.device) -> list[float]:
    """Return the milliseconds per step of each timed window."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    for _ in range(WARM_UP):
        step()
    windows = []
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        for _ in range(steps):
            step()
        wait()
        windows.append(1e3 * (time.perf_counter() - began) / steps)
    return windows


def main() -> None:
    """Time and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30, help="steps per timed window")
    parser.add_argument("--repeats", type=int, default=9, help="timed windows")
    parser.add_argument("--json", type=Path, help="file for the figures")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rows = []
    print(f"| step on {name} | ms (median) | spread |\n|---|---|---|")
    for label in ["default", "compiled"] if device.type == "cuda" else ["default"]:
        windows = milliseconds(make_step(label == "compiled", device), options.steps, options.repeats, device)
        rows.append({"step": label, "ms": statistics.median(windows), "spread_ms": max(windows) - min(windows)})
        print(f"| {label} | {rows[-1]['ms']:.3f} | {rows[-1]['spread_ms']:.3f} |", flush=True)
    if options.json:
        report = {"device": name, "torch": torch.__version__, "threads": torch.get_num_threads(), "rows": rows}
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
