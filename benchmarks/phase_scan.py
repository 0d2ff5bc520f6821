"""Time the phase scan on a GPU beside other implementations, in one process.

python -m benchmarks.phase_scan [--names ours eager ...] [--shapes 8,4096,1024 ...] [--types float32 bfloat16]
    [--variants plain mass channel input window] [--window 64] [--repeats 30] [--limit 120] [--first_call] [--json FILE]

A shape is B, T, D. The variants are those of `phase_scan_peers.py`: no decay, masses, a decay per channel, a decay per
position, and a window of `--window` positions without decay. The others are the reference in PyTorch, cumulative sums
and `torch.compile` of them, both without decay only, PyTorch's associative scan, and accelerated_scan, with its change
of layout and without: the latter computes a scan over channels, and only its time counts. These two have no window.
Each has a process of its own, one after another, which ends after `--limit` seconds.

Times are medians over `--repeats` runs of the forward and of forward and backward, called from Python and replayed as a
CUDA graph; `nan` says that an implementation cannot do this. `host` is the time until a call from Python returns. `copy
%` is the share of a device copy's rate that the least possible traffic would have in that time: in the forward each
input read and the output written once, in the backward each input and the cotangent read and each gradient written
once. Peak memory is of forward and backward above the inputs, and `least` is what the output and the gradients need.
`error` is the largest error of output and gradients against the reference in fp64, RMS over RMS, on some channels.
`--json` appends a line per row, once it is measured. `--first_call` times the first forward and backward of a fresh
process without caches instead. On a CPU, which runs the reference, there are no graphs and no peak memory.
"""

import argparse
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.phase_scan_peers import RULES, VARIANTS, WITH_WINDOW, WITHOUT_DECAY, Rule, inputs
from benchmarks.timing import DEVICE, copy_rate, graph_milliseconds, host_milliseconds, milliseconds
from kernels.phase_scan import phase_scan

SHAPES = ["32,256,128", "32,1024,512", "8,4096,1024"]
COLUMNS = (
    "forward ms",
    "graph ms",
    "both ms",
    "both graph ms",
    "host ms",
    "both host ms",
    "copy %",
    "both copy %",
    "peak MiB",
    "least MiB",
    "error",
)
CHECKED = 16  # channels
FIRST_CALL = """
import time, torch
from benchmarks.phase_scan_peers import inputs, ours
values = inputs("input", 8, 4096, 1024, torch.float32, "cuda")
torch.cuda.synchronize()
start = time.perf_counter()
torch.autograd.grad(ours(**values).sum(), list(values.values()))
torch.cuda.synchronize()
print(f"{time.perf_counter() - start:.2f}")
"""


def attempt(measurement: Callable[[], float], what: str) -> float:
    """Return a measurement, or NaN and a line on the screen where an implementation cannot do it."""
    try:
        return measurement()
    except Exception as error:  # whatever another implementation raises
        print(f"{what}: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160])
        return float("nan")


def measure(
    name: str, rule: Rule, values: dict[str, Tensor], window: int | None, rate: float, repeats: int
) -> dict[str, float]:
    """Return the row of one implementation at one shape."""
    tensors = list(values.values())
    cotangent = torch.randn_like(values["x"])

    def forward() -> Tensor:
        with torch.no_grad():
            return rule(**values)

    def both() -> object:
        return torch.autograd.grad(rule(**values), tensors, cotangent)

    def peak() -> float:
        if DEVICE == "cpu":
            return float("nan")
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        both()
        return (torch.cuda.max_memory_allocated() - before) / 2**20

    read, written = sum(x.nbytes for x in tensors), cotangent.nbytes
    first = attempt(lambda: milliseconds(forward, repeats), f"{name}, forward")
    if first != first:
        return dict.fromkeys(COLUMNS, first)
    row = {
        "forward ms": first,
        "graph ms": attempt(lambda: graph_milliseconds(forward, repeats), f"{name}, forward as a graph"),
        "both ms": attempt(lambda: milliseconds(both, repeats), f"{name}, both"),
        "both graph ms": attempt(lambda: graph_milliseconds(both, repeats), f"{name}, both as a graph"),
        "host ms": attempt(lambda: host_milliseconds(forward, repeats), f"{name}, launch of the forward"),
        "both host ms": attempt(lambda: host_milliseconds(both, repeats), f"{name}, launch of both"),
    }
    fastest, fastest_both = (
        min((t for t in times if t == t), default=float("nan"))
        for times in ((row["forward ms"], row["graph ms"]), (row["both ms"], row["both graph ms"]))
    )
    row["copy %"] = 100 * (read + written) / rate / fastest * 1e3
    row["both copy %"] = 100 * (3 * read + 2 * written) / rate / fastest_both * 1e3
    row |= {"peak MiB": attempt(peak, f"{name}, memory"), "least MiB": (read + written) / 2**20}
    return row | {"error": attempt(lambda: error(rule, values, window, cotangent), f"{name}, error")}


def error(rule: Rule, values: dict[str, Tensor], window: int | None, cotangent: Tensor) -> float:
    """Return the largest error of output and gradients on some channels, RMS over RMS."""
    exact: dict[str, Any] = {name: x[..., :CHECKED].detach().double().requires_grad_() for name, x in values.items()}
    expected = (
        phase_scan(**exact, window=window, backend="reference")[0],
        list(exact.values()),
        cotangent[..., :CHECKED].double(),
    )
    found = rule(**values), list(values.values()), cotangent
    pairs = zip(
        (found[0], *torch.autograd.grad(*found)), (expected[0].detach(), *torch.autograd.grad(*expected)), strict=True
    )
    return max(float((x[..., :CHECKED].detach().double() - y).norm() / y.norm()) for x, y in pairs)


def first_call() -> float:
    """Return the seconds of the first forward and backward in a fresh process."""
    with tempfile.TemporaryDirectory() as cache:
        paths = {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(Path(__file__).parents[1])}
        run = subprocess.run(
            [sys.executable, "-c", FIRST_CALL], env=os.environ | paths, capture_output=True, text=True, check=True
        )
    return float(run.stdout)


def run_alone(name: str, options: argparse.Namespace) -> None:
    """Measure one implementation in this process: print a row per shape, type and variant."""
    rate = copy_rate()
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    machine = {"device": device, "torch": torch.__version__, "copy_bytes_per_second": rate}
    print(f"\n{name}: {device}, torch {torch.__version__}, copy {rate / 1e12:.3g} TB/s")
    print(f"{'':<30}" + "".join(f"{column:>14}" for column in COLUMNS))
    for shape, dtype, variant in itertools.product(options.shapes, options.types, options.variants):
        if name in WITHOUT_DECAY and variant in ("channel", "input"):
            continue
        if name not in WITH_WINDOW and variant == "window":
            continue
        torch.compiler.reset()  # after some shapes, PyTorch would no longer compile
        B, T, D = map(int, shape.split(","))
        values = inputs(variant, B, T, D, getattr(torch, dtype), DEVICE)
        window = options.window if variant == "window" else None
        rule = RULES[name] if window is None else partial(RULES[name], window=window)
        row = measure(name, rule, values, window, rate, options.repeats)
        figures = "".join(f"{row[column]:>14.3g}" for column in COLUMNS)
        print(f"{shape + ' ' + dtype + ' ' + variant:<30}" + figures, flush=True)
        if options.json:
            with options.json.open("a") as file:
                case = {"shape": shape, "type": dtype, "variant": variant, "window": window, "name": name}
                file.write(json.dumps(case | row | machine) + "\n")


def run_each(names: list[str], limit: float) -> None:
    """Measure each implementation in a process of its own, with the other options of this one."""
    for name in names:
        try:
            subprocess.run([sys.executable, "-m", __spec__.name, *sys.argv[1:], "--names", name], timeout=limit)
        except subprocess.TimeoutExpired:
            print(f"{name}: ended after {limit:g} s", flush=True)


def main() -> None:
    """Print a table per implementation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=list(RULES), choices=list(RULES))
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--types", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--window", type=int, default=64, help="positions, in the variant of this name")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--limit", type=float, default=120, help="seconds of an implementation")
    parser.add_argument("--first_call", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.first_call:
        print(f"first forward and backward: {first_call():.1f} s")
    elif len(options.names) == 1:
        run_alone(options.names[0], options)
    else:
        run_each(options.names, options.limit)


if __name__ == "__main__":
    main()
