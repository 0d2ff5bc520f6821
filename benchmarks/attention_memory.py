"""Measure what attention weights cost: memory and time of one attention layer with and without them.

python benchmarks/attention_memory.py [--seq_len 512] [--batch 8] [--bf16] [--json FILE]

The layer is the attention of a decoder with `--width` and `--heads`, alone: one forward and one backward. A hook on the
site `pattern` makes it compute the attention weights [B, H, T, T]; without a hook it runs
`scaled_dot_product_attention`, which does not store them. Peak memory is what one step allocates above the weights and
the input: `torch.cuda.max_memory_allocated` on a GPU, the PyTorch profiler's record of allocations on a CPU. Times are
medians over `--repeats` steps.
"""

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lightning_modules.separability.attention import Attention

WARM_UP = 3  # steps before anything is measured


class Layer:
    """One attention layer with its input.

    Args:
        attention: The layer.
        x_BTD: The input.
        bf16: Run in bf16 by autocast, as the Trainer's `bf16-mixed` does.
    """

    def __init__(self, attention: Attention, x_BTD: Tensor, bf16: bool):
        self.attention, self.x_BTD, self.bf16 = attention, x_BTD.requires_grad_(), bf16

    def step(self) -> None:
        """Run forward and backward, and drop the gradients."""
        with torch.autocast(self.x_BTD.device.type, torch.bfloat16, enabled=self.bf16):
            output = self.attention(self.x_BTD)
        torch.autograd.backward(output.float().sum())
        self.x_BTD.grad = None
        self.attention.zero_grad(set_to_none=True)

    def seconds(self, repeats: int) -> float:
        """Return the median time of a step."""
        times = []
        for _ in range(repeats):
            self._synchronize()
            start = time.perf_counter()
            self.step()
            self._synchronize()
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    def peak_bytes(self) -> int:
        """Return the peak of the memory that a step allocates."""
        if self.x_BTD.device.type == "cpu":
            return self._peak_bytes_cpu()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        self.step()
        return torch.cuda.max_memory_allocated() - before

    def _peak_bytes_cpu(self) -> int:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            self.step()
        with tempfile.TemporaryDirectory() as folder:
            profiler.export_chrome_trace(f"{folder}/trace.json")
            events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
        events = sorted((event for event in events if event["name"] == "[memory]"), key=lambda event: event["ts"])
        peak = allocated = 0
        for event in events:
            allocated += event["args"]["Bytes"]  # negative where memory is freed
            peak = max(peak, allocated)
        return peak

    def _synchronize(self) -> None:
        if self.x_BTD.device.type == "cuda":
            torch.cuda.synchronize()


def keep(module: nn.Module, args: object, output: Tensor) -> None:
    """Do nothing, as a forward hook: that there is a hook makes the attention compute its weights."""


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, dict[str, float]]:
    """Return MiB and milliseconds of a step, with and without the attention weights, and their ratios."""
    torch.manual_seed(0)
    attention = Attention(options.width, options.heads).to(device)
    layer = Layer(attention, torch.randn(options.batch, options.seq_len, options.width, device=device), options.bf16)
    rows: dict[str, dict[str, float]] = {}
    for name, hooked in {"with a hook on `pattern`": True, "without a hook": False}.items():
        hook = attention.pattern.register_forward_hook(keep) if hooked else None
        for _ in range(WARM_UP):
            layer.step()
        rows[name] = {"mib": layer.peak_bytes() / 2**20, "ms": 1e3 * layer.seconds(options.repeats)}
        if hook is not None:
            hook.remove()
    stored, fused = rows.values()
    rows["ratio"] = {key: stored[key] / fused[key] for key in stored}
    return rows


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"width": 256, "heads": 4, "seq_len": 512, "batch": 8, "repeats": 20}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    parser.add_argument("--bf16", action="store_true", help="run in bf16 by autocast; fp32 without it")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    rows = measure(options, device)
    print(f"| attention ({name}) | peak MiB | ms, forward and backward |\n|---|---|---|")
    for label, row in rows.items():
        print(f"| {label} | {row['mib']:.1f} | {row['ms']:.2f} |")
    if options.json:
        sizes = {key: getattr(options, key) for key in ("width", "heads", "seq_len", "batch", "repeats", "bf16")}
        figures = {"device": name, "torch": torch.__version__, **sizes, "rows": rows}
        options.json.write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
