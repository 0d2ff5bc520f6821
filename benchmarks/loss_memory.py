"""Measure what the logits of a large vocabulary cost in a training step: memory and time of unembedding and loss.

python benchmarks/loss_memory.py [--vocab_size 50257] [--positions 2048] [--shares 1 0.03] [--bf16] [--json FILE]

- `all logits`: logits at every position, then the cross-entropy (`member_losses`).
- `in chunks`: logits at labelled positions alone, some at a time, and again in the backward
  (`linear_member_losses`).

A share is that of the positions that have a label: 1 in language models, a few percent in `NeedleGym`. One forward and
one backward with respect to the `--width` features and the weights. Peak memory is what a step allocates above its
inputs and their gradients: `torch.cuda.max_memory_allocated` on a GPU, the PyTorch profiler's record of allocations on
a CPU. Times are medians over `--repeats` steps.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from datamodules.batch import IGNORE
from lightning_modules.core.losses import linear_member_losses, member_losses


def all_logits(x_SBTD: Tensor, weight_SVD: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the loss from the logits of all positions, loss_S."""
    return member_losses(x_SBTD @ weight_SVD.mT[:, None], labels_BT)


def in_chunks(x_SBTD: Tensor, weight_SVD: Tensor, labels_BT: Tensor) -> Tensor:
    """Return the same loss without them; the labels are counted on the host, as in a training step."""
    return linear_member_losses(x_SBTD, weight_SVD, labels_BT, int((labels_BT.cpu() != IGNORE).sum()))[0]


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """Return the peak of the memory that a step allocates."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    peak = allocated = 0
    for event in sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"]):
        allocated += event["args"]["Bytes"]  # negative where memory is freed
        peak = max(peak, allocated)
    return peak


def measure(
    loss: Callable[[Tensor, Tensor, Tensor], Tensor], share: float, options: argparse.Namespace, device: torch.device
) -> dict[str, float]:
    """Return peak MiB, median milliseconds and the loss of a step."""
    torch.manual_seed(0)
    x_SBTD = torch.randn(1, 1, options.positions, options.width, device=device)
    weight_SVD = torch.randn(1, options.vocab_size, options.width, device=device) * options.width**-0.5
    labels_BT = torch.randint(options.vocab_size, (1, options.positions), device=device)
    labels_BT[:, round(share * options.positions) :] = IGNORE
    for x in (x_SBTD, weight_SVD):
        x.requires_grad_().grad = torch.zeros_like(x)
    value = torch.empty(0)

    def step() -> None:
        nonlocal value
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            loss_S = loss(x_SBTD, weight_SVD, labels_BT)
        torch.autograd.backward(loss_S.sum())
        value = loss_S.detach()
        if device.type == "cuda":
            torch.cuda.synchronize()

    step()  # before anything is measured
    times = []
    for _ in range(options.repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    mib = peak_bytes(step, device) / 2**20
    return {"mib": mib, "ms": 1e3 * statistics.median(times), "loss": value.item()}


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"vocab_size": 50257, "positions": 2048, "width": 512, "repeats": 3}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--shares", type=float, nargs="+", default=[1.0, 0.03], help="default: 1 0.03")
    parser.add_argument("--bf16", action="store_true", help="run in bf16 by autocast; fp32 without it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"| labelled ({name}) | loss | peak MiB | ms, forward and backward | value |\n|---|---|---|---|---|")
    rows = []
    for share in options.shares:
        for label, loss in {"all logits": all_logits, "in chunks": in_chunks}.items():
            row = measure(loss, share, options, device)
            print(f"| {share:.0%} | {label} | {row['mib']:.0f} | {row['ms']:.0f} | {row['loss']:.5f} |", flush=True)
            rows.append({"share": share, "loss": label, **row})
    if options.json:
        options.json.write_text(json.dumps({"device": name, "options": str(options), "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
