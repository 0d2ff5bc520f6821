# mypy: disable-error-code="import-untyped"
"""Time the gated delta kernels on a GPU with other launches than those of the table in `configurations.py`.

python -m benchmarks.gated_delta_configurations [--shape 8,4096,16,64,128] [--kernels prepare outputs sweeps gradients]
    [--repeats 10] [--share 0/1]

One launch of one kernel changes at a time: its columns of V, its warps and its stages. Each row is the median time of
forward and backward, replayed as a CUDA graph; the row `table` changes nothing. Most of the time goes into compilation:
`--share 1/4` times the second of four parts of the rows, so that four processes at once compile all of them, and the
times of a process that runs alone after them are right.
"""

import argparse
from collections.abc import Iterator
from dataclasses import replace
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from triton.runtime.errors import OutOfResources

from benchmarks.gated_delta import inputs, ours
from benchmarks.timing import graph_milliseconds
from kernels.gated_delta import problem
from kernels.gated_delta.configurations import Configuration, Launch, configuration

# One stage is left out: with bf16 inputs Triton 3.6 then makes code that reads out of range of the shared memory
GRIDS = {
    "prepare": ((0,), (1, 2, 4, 8), (2,)),
    "outputs": ((16, 32, 64), (4, 8), (2, 3)),
    "sweeps": ((16, 32, 64), (4, 8), (2, 3)),
    "gradients": ((32, 64, 128), (4, 8), (2, 3)),
}


def variants(table: Configuration, kernels: list[str]) -> Iterator[tuple[str, Configuration]]:
    """Return the table's configuration and those that differ in one launch, with their names."""
    yield "table", table
    for kernel in kernels:
        for launch in (Launch(*numbers) for numbers in product(*GRIDS[kernel])):
            change: dict[str, Any] = {kernel: launch}
            if launch != getattr(table, kernel):
                yield f"{kernel} {launch}", replace(table, **change)


def time_of(how: Configuration, values: list[torch.Tensor], repeats: int) -> float:
    """Return the milliseconds of forward and backward with a configuration; NaN if the GPU has too little memory."""
    cotangent = torch.randn_like(values[2])
    with patch.object(problem, "configuration", lambda *key: how):
        try:
            return graph_milliseconds(lambda: torch.autograd.grad(ours(*values), values, cotangent), repeats)
        except OutOfResources:
            return float("nan")


def main() -> None:
    """Print the rows as they are measured, and the fastest of each kernel at the end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8,4096,16,64,128")
    parser.add_argument("--kernels", nargs="+", default=list(GRIDS), choices=GRIDS)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--share", default="0/1", help="I/N: part I, from 0, of N parts of the rows")
    options = parser.parse_args()
    part, parts = map(int, options.share.split("/"))
    values = inputs(*map(int, options.shape.split(",")))
    table = configuration(torch.cuda.get_device_capability()[0], True, values[1].shape[-1])
    print(f"{options.shape}: forward and backward (ms)")
    times: dict[str, float] = {}
    for name, how in list(variants(table, options.kernels))[part::parts]:
        times[name] = time_of(how, values, options.repeats)
        print(f"{times[name]:>12.3f}  {name}", flush=True)
    for kernel in options.kernels:
        rows = {name: t for name, t in times.items() if name.startswith((kernel, "table")) and t == t}
        if rows:
            print(f"fastest {kernel}: {min(rows, key=lambda name: rows[name])}")


if __name__ == "__main__":
    main()
