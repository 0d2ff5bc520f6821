"""Time the gated delta kernels on a GPU beside other implementations, in one process.

python -m benchmarks.gated_delta [--shapes 4,2048,8,64,128 ...] [--names ours flash ...] [--repeats 30] [--first_call]
    [--json FILE]

A shape is B, T, H, K, V, in bf16 with normalised keys. The others are flash-linear-attention if it can be imported,
transformers' reference, which calls flash-linear-attention where that can be imported, and `torch.compile` of our
reference, which takes minutes to compile per shape. `--names` are the beginnings of the names of those to time. Times
are medians over `--repeats` runs of the forward and of forward and backward, called from Python and replayed as a CUDA
graph. `host` is the time until a call from Python returns, which launches its kernels but does not wait for them.
`copy` is the share of a device copy's rate that the least possible traffic would have in that time: each input read and
each output written once in the forward, and all of that again and the gradients in the backward. Peak memory is of
forward and backward, above the inputs. `--first_call` times the first forward and backward of a fresh process without
caches instead, in which all kernels are compiled.
"""

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import copy_rate, graph_milliseconds, host_milliseconds, milliseconds
from kernels.gated_delta import chunk_gated_delta_rule
from kernels.gated_delta.reference import chunk_gated_delta_rule as reference

SHAPES = ["4,2048,8,64,128", "16,2048,8,64,128", "1,32768,8,64,128", "8,4096,16,64,128", "8,4096,16,128,128"]
FIRST_CALL = """
import time, torch
from benchmarks.gated_delta import inputs, ours
values = inputs(4, 2048, 8, 64, 128)
torch.cuda.synchronize()
start = time.perf_counter()
torch.autograd.grad(ours(*values).sum(), values)
torch.cuda.synchronize()
print(f"{time.perf_counter() - start:.2f}")
"""

Rule = Callable[..., Tensor]


def inputs(B: int, T: int, H: int, K: int, V: int) -> list[Tensor]:
    """Return q, k, v, g and beta as a model makes them."""
    q, k = (torch.randn(B, T, H, K, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(B, T, H, V, device="cuda", dtype=torch.bfloat16)
    g = -torch.rand(B, T, H, device="cuda") / 10
    return [x.requires_grad_() for x in (q, k, v, g, torch.rand(B, T, H, device="cuda"))]


def ours(*values: Tensor) -> Tensor:
    """Run the Triton kernels."""
    q, k, v, g, beta = values
    return chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True)[0]


def ours_to_one(*values: Tensor) -> Tensor:
    """Run the Triton kernels for betas that never exceed 1, which those of `inputs` do not."""
    q, k, v, g, beta = values
    return chunk_gated_delta_rule(q, k, v, g, beta, use_qk_l2norm_in_kernel=True, allow_negative_eigenvalues=False)[0]


def peers() -> dict[str, Rule]:
    """Return the other implementations that can be imported, the one that takes minutes to compile last."""
    found: dict[str, Rule] = {}
    os.environ["FLA_FLASH_QLA"] = "0"
    try:
        fla: Any = importlib.import_module("fla.ops.gated_delta_rule")
        guarded: Any = importlib.import_module("fla.ops.common.chunk_o")
        # Lets it run with a Triton that miscompiles it: the time is right, gradients are not
        guarded.TRITON_ABOVE_3_7_1 = True
        found["flash-linear-attention"] = lambda *x: fla.chunk_gated_delta_rule(*x, use_qk_l2norm_in_kernel=True)[0]
    except ImportError as error:
        print(f"without flash-linear-attention: {error}")
    transformers = importlib.import_module("transformers.models.qwen3_next.modeling_qwen3_next")
    rule = transformers.torch_chunk_gated_delta_rule
    found["transformers"] = lambda *x: rule(*x, use_qk_l2norm_in_kernel=True)[0]
    compiled: Any = torch.compile(reference)
    return found | {"reference, compiled": lambda *x: compiled(*x, use_qk_l2norm_in_kernel=True)[0]}


def measure(rule: Rule, values: list[Tensor], rate: float, repeats: int) -> dict[str, float]:
    """Return the row of one implementation at one shape."""
    cotangent = torch.randn_like(values[2])

    def forward() -> Tensor:
        with torch.no_grad():
            return rule(*values)

    def both() -> object:
        return torch.autograd.grad(rule(*values), values, cotangent)

    traffic = sum(x.nbytes for x in values) + values[2].nbytes
    row = {"forward ms": milliseconds(forward, repeats), "graph ms": graph_milliseconds(forward, repeats)}
    row |= {"both ms": milliseconds(both, repeats), "both graph ms": graph_milliseconds(both, repeats)}
    row |= {"host ms": host_milliseconds(forward, repeats), "both host ms": host_milliseconds(both, repeats)}
    row["copy %"] = 100 * traffic / rate / min(row["forward ms"], row["graph ms"]) * 1e3
    fastest = min(row["both ms"], row["both graph ms"])
    row["both copy %"] = 100 * (2 * traffic + sum(x.nbytes for x in values)) / rate / fastest * 1e3
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    both()
    return row | {"peak MiB": (torch.cuda.max_memory_allocated() - before) / 2**20}


def first_call() -> float:
    """Return the seconds of the first forward and backward in a fresh process."""
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"TRITON_CACHE_DIR": cache, "PYTHONPATH": str(Path(__file__).parents[1])}
        run = subprocess.run(
            [sys.executable, "-c", FIRST_CALL], env=environment, capture_output=True, text=True, check=True
        )
    return float(run.stdout)


def main() -> None:
    """Print a table per implementation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--names", nargs="+", default=[""])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--first_call", action="store_true")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.first_call:
        print(f"first forward and backward: {first_call():.1f} s")
        return
    rate, every = copy_rate(), {"ours": ours, "ours, betas of at most 1": ours_to_one} | peers()
    rules = {name: rule for name, rule in every.items() if name.startswith(tuple(options.names))}
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, copy {rate / 1e12:.2f} TB/s")
    rows = []
    for name, rule in rules.items():
        for index, shape in enumerate(options.shapes):
            row = measure(rule, inputs(*map(int, shape.split(","))), rate, options.repeats)
            if index == 0:
                print(f"\n{name:<26}" + "".join(f"{column:>15}" for column in row))
            print(f"{shape:<26}" + "".join(f"{number:>15.3f}" for number in row.values()), flush=True)
            rows.append({"shape": shape, "name": name, **row})
            if options.json:
                options.json.write_text(json.dumps({"copy_bytes_per_second": rate, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
