# mypy: disable-error-code="import-untyped"
"""Time each of the gated delta kernels alone on a GPU, with other launches than that of `configurations.py`.

python -m benchmarks.gated_delta_configurations [--shapes 8,4096,16,64,128 ...] [--parts 1 2] [--processes 8]
    [--kernels prepare_chunks ...] [--registers 0 128] [--json FILE]

A launch is the columns of V, the warps, the pipeline stages, and the largest number of registers per thread, where 0
sets none. A time is the median of replays of a CUDA graph. `--processes` compile the launches at the same time, each a
part of them, before one process times all. The fastest launches of a kernel come first, and `table` marks the one of
the table. `--parts` are other precisions of products than the table's.
"""

import argparse
import itertools
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.errors import OutOfResources

from benchmarks.gated_delta import inputs, ours
from benchmarks.timing import graph_milliseconds
from kernels.gated_delta import launch, problem
from kernels.gated_delta.configurations import Launch, configuration

# One stage is left out: with bf16 inputs Triton 3.6 then makes code that reads out of range of the shared memory
GRIDS = {
    "prepare_chunks": ((0,), (1, 2, 4), (2,)),
    "compute_outputs": ((16, 32, 64, 128), (4, 8), (2, 3)),
    "sweep_both_ways": ((16, 32, 64, 128), (4, 8), (2, 3)),
    "compute_gradients": ((32, 64, 128), (4, 8), (2, 3)),
}
SHAPES = ["4,2048,8,64,128", "8,4096,16,64,128", "8,4096,16,128,128"]


@dataclass(frozen=True)
class Call:
    """One launch of a kernel in a forward and backward, ready to run again with other launches."""

    kernel: Any
    problem: problem.Problem
    programs: int
    table: Launch
    tensors: tuple[Tensor | None, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The name of the kernel."""
        return str(self.kernel.fn.__name__)

    def with_launch(self, launch: Launch, registers: int) -> Callable[[], None]:
        """Return a run of the kernel with another launch."""
        programs = self.programs
        if self.name in ("compute_outputs", "sweep_both_ways"):
            programs = programs // self.problem.blocks(self.table) * self.problem.blocks(launch)
        call = self.problem.call(self.kernel, programs, launch, self.options)
        call.how |= {"maxnreg": registers} if registers else {}
        return lambda: call(*self.tensors)


def record(shape: str, parts: int | None) -> list[Call]:
    """Return the launches of a forward and backward in bf16."""
    calls: list[Call] = []
    make: Callable[..., Callable[..., None]] = problem.Problem.call

    def keep(self: problem.Problem, *launched: Any) -> Callable[..., None]:
        kernel, programs, launch, options = launched

        def run(*tensors: Tensor | None) -> None:
            calls.append(Call(kernel, self, programs, launch, tensors, options))
            make(self, *launched)(*tensors)

        return run

    def how(major: int, half: bool, width: int, negative: bool) -> object:
        table = configuration(major, half, width, negative and parts != 1)
        return table if parts is None else replace(table, parts=parts)

    values = inputs(*map(int, shape.split(",")))
    for plan in (launch.plan_forward, launch.plan_backward):
        plan.cache_clear()
    with (
        patch.object(problem.Problem, "call", keep),
        patch.object(problem, "configuration", how),
        patch.object(launch, "compile_step"),  # it would compile the launches of the table
    ):
        torch.autograd.grad(ours(*values), values, torch.randn_like(values[2]))
    return calls


def launches(call: Call, limits: list[int]) -> Iterator[tuple[Launch, int]]:
    """Return the launches of a kernel's grid, and that of the table."""
    grid = [Launch(*numbers) for numbers in itertools.product(*GRIDS[call.name])]
    return itertools.product(dict.fromkeys([call.table, *grid]), limits)


def time_of(call: Call, launch: Launch, registers: int, repeats: int) -> float:
    """Return the milliseconds of a launch; NaN if the GPU has too little memory for it."""
    try:
        return graph_milliseconds(call.with_launch(launch, registers), repeats)
    except OutOfResources:
        return float("nan")


def compile_all(processes: int) -> None:
    """Let processes compile the launches into Triton's cache, each a part of them."""
    command = [sys.executable, "-m", "benchmarks.gated_delta_configurations", *sys.argv[1:], "--processes", "0"]
    running = [subprocess.Popen([*command, "--share", f"{i}/{processes}"]) for i in range(processes)]
    for process in running:
        process.wait()


def main() -> None:
    """Print the launches of each kernel, the fastest first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=SHAPES)
    parser.add_argument("--kernels", nargs="+", default=list(GRIDS), choices=GRIDS)
    parser.add_argument("--parts", nargs="+", type=int, default=[None])
    parser.add_argument("--registers", nargs="+", type=int, default=[0])
    parser.add_argument("--processes", type=int, default=0)
    parser.add_argument("--share", help=argparse.SUPPRESS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.processes:
        compile_all(options.processes)
    rows = []
    for shape, parts in itertools.product(options.shapes, options.parts):
        for call in (call for call in record(shape, parts) if call.name in options.kernels):
            todo = list(launches(call, options.registers))
            if options.share:
                share, shares = map(int, options.share.split("/"))
                for launch, registers in todo[share::shares]:
                    time_of(call, launch, registers, 1)
                continue
            found = [(time_of(call, launch, registers, 20), launch, registers) for launch, registers in todo]
            print(f"\n{shape}, parts {parts or 'of the table'}, {call.name}: ms, columns, warps, stages, registers")
            for ms, launch, registers in sorted(found, key=lambda row: (row[0] != row[0], row[0])):
                mark = "  table" if (launch, registers) == (call.table, 0) else ""
                numbers = launch.columns, launch.warps, launch.stages, registers
                print(f"{ms:>10.3f}" + "".join(f"{number:>5}" for number in numbers) + mark, flush=True)
                rows.append({"shape": shape, "parts": parts, "kernel": call.name, "ms": ms, "launch": numbers})
            if options.json:
                options.json.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
