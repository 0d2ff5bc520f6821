# mypy: disable-error-code="import-untyped"
"""Compile the gated delta kernels and print what they use: registers, memory of spilled registers, shared memory.

python benchmarks/gated_delta_registers.py [--architecture 90] [--types bfloat16] [--widths 64x128 128x128] [--packed]

It needs no GPU: Triton brings the compiler. `spilled` is the bytes of registers per thread that lie in memory; a kernel
with some is slower, not wrong. `wgmma` and `mma` count instructions for Hopper's tensor cores and for older ones.
`races` are tiles whose next load may begin while a product on Hopper's tensor cores still reads them, as `gradients.py`
explains. The script ends with exit code 1 if there is one, or if a kernel needs more shared memory than Hopper has.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.call import Call
from kernels.gated_delta import launch, problem
from kernels.gated_delta.configurations import configuration

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}
SHARED = 227  # KB of shared memory for a program on Hopper
ROWS, HEADS = 256, 2  # of the inputs; the code depends on neither

Arguments = dict[str, Any]


def record_calls(
    dtype: torch.dtype, width: int, columns: int, packed: bool, architecture: int, negative: bool
) -> list[tuple[Call, Arguments]]:
    """Return the kernels of a forward and backward with their arguments, without a run."""
    calls: list[tuple[Call, Arguments]] = []

    def record(self: Call, *tensors: Tensor | None) -> None:
        calls.append((self, dict(zip(self.kernel.arg_names, tensors, strict=False)) | self.constants))

    def of_architecture(major: int, half: bool, width: int, negative: bool) -> object:
        return configuration(architecture // 10, half, width, negative)

    q = torch.empty(1, ROWS, HEADS, width, dtype=dtype)
    v, g = torch.empty(1, ROWS, HEADS, columns, dtype=dtype), torch.empty(1, ROWS, HEADS)
    bounds = torch.tensor([0, ROWS]) if packed else None
    with patch.object(Call, "__call__", record), patch.object(problem, "configuration", of_architecture):
        o, _, A, P, factors = launch.run_forward(q, q, v, g, g, None, bounds, 0.1, True, negative, False)
        launch.run_backward(o, None, q, q, v, g, None, bounds, A, P, factors, 0.1, True, negative)
    return calls


def races(code: str) -> int:
    """Count the tiles in Triton's code for a GPU that a load overwrites while a product may still read them.

    Triton gives a tile one buffer per stage if only products read it, and one less if arithmetic reads it too. A
    product runs on until a wait leaves at most `pendings` of the last ones.
    """
    buffers = {
        name: int(count) for name, count in re.findall(r"%(\S+) = ttg.local_alloc : .*memdesc<(\d+)x\d+x\d+x", code)
    }
    views: dict[str, str] = {}
    running: list[set[str]] = []
    found: set[str] = set()
    for line in code.splitlines():
        if match := re.search(r"%(\S+) = ttg.memdesc_\w+ %([\w#]+)", line):
            views[match[1]] = views.get(match[2], match[2])
        elif match := re.search(r"warp_group_dot %([\w#]+), %([\w#]+)", line):
            running.append({views.get(name, name) for name in match.groups()})
        elif match := re.search(r"warp_group_dot_wait.*pendings = (\d+)", line):
            running = running[max(len(running) - int(match[1]), 0) :]
        elif match := re.search(r"async_copy_global_to_local %[\w#]+, %([\w#]+)", line):
            tile = views.get(match[1], match[1])
            if any(tile in tiles for tiles in running) and buffers[tile] < max(buffers.values()):
                found.add(tile)
    return len(found)


def compile_call(call: Call, arguments: Arguments, architecture: int) -> tuple[str, bool]:
    """Compile a kernel and return a row of the table, and whether the kernel can run on Hopper without races."""
    kernel = call.kernel
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = arguments[name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32" if isinstance(value, int) else "fp32"
    start = time.perf_counter()
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", architecture, 32),
        options=call.how,
    )
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        usage = subprocess.run([tool, "-res-usage", binary], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    registers, spilled = found.groups() if found else ("?", "?")
    counts = [compiled.asm["ptx"].count(name) for name in ("wgmma.mma_async", "mma.sync")]
    shared, raced = -(-compiled.metadata.shared // 1024), races(compiled.asm["ttgir"])
    cells = call.how["num_warps"], arguments.get("BV", 0), registers, spilled, shared, *counts, raced
    row = f"{kernel.fn.__name__:<18}" + "".join(f"{cell!s:>11}" for cell in cells) + f"{seconds:>9.1f}"
    return row, raced == 0 and shared <= SHARED


def main() -> None:
    """Print a table per type and size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--types", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--widths", nargs="+", default=["16x16", "64x64", "64x128", "128x128", "256x256"], help="K x V")
    parser.add_argument("--packed", action="store_true", help="sequences of several lengths")
    parser.add_argument("--beta_to_one", action="store_true", help="without negative eigenvalues")
    options = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the behaviour of older versions of Triton
    names = "warps", "columns", "registers", "spilled", "shared KB", "wgmma", "mma", "races", "seconds"
    print(f"Triton {triton.__version__}, architecture {options.architecture}")
    right = True
    for dtype in options.types:
        for widths in options.widths:
            K, V = map(int, widths.split("x"))
            print(f"\n{dtype:<9}{widths:<9}" + "".join(f"{name:>11}" for name in names[:-1]) + f"{names[-1]:>9}")
            negative = not options.beta_to_one
            for call in record_calls(getattr(torch, dtype), K, V, options.packed, options.architecture, negative):
                row, runs = compile_call(*call, options.architecture)
                print(row, flush=True)
                right &= runs
    if not right:
        sys.exit("A kernel has a race or needs too much shared memory")


if __name__ == "__main__":
    main()
