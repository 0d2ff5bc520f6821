# mypy: disable-error-code="import-untyped"
"""Compile the phase scan kernels and print what they use: registers, memory of spilled registers, shared memory.

python benchmarks/phase_scan_registers.py [--architecture 90] [--types bfloat16 float32] [--variants plain all]

It needs no GPU: Triton brings the compiler. `spilled` is the bytes of registers per thread that lie in memory; a kernel
with some is slower, not wrong. `per value` counts the machine instructions of the loop over tiles, per value and
thread: a GPU of 132 multiprocessors issues about 80 of them in the time in which a copy moves 12 bytes.
"""

import argparse
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from kernels.call import Call as Launched
from kernels.phase_scan import launch, problem
from kernels.phase_scan.configurations import Launch
from kernels.phase_scan.launch import forget_plans

POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.int64: "*i64"}
ROWS, CHANNELS = 256, 128  # of the inputs; the code does not depend on the rows
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "channel decay": {"channel": True},
    "input decay": {"gates": True},
    "mass": {"mass": True},
    "all": dict.fromkeys(("gates", "mass", "offsets", "normalise", "imaginary", "packed", "state"), True),
    "window 8": {"window": 8},
    "window 64": {"window": 64},
    "window 256": {"window": 256},
    "window, all": {"window": 256} | dict.fromkeys(("mass", "offsets", "imaginary", "packed", "state"), True),
}

Call = tuple[Any, Launch, dict[str, Any]]


def record_calls(
    dtype: torch.dtype,
    channel: bool = False,
    gates: bool = False,
    mass: bool = False,
    offsets: bool = False,
    normalise: bool = False,
    imaginary: bool = False,
    packed: bool = False,
    state: bool = False,
    window: int | None = None,
) -> list[Call]:
    """Return the kernels of a forward and backward with their arguments, without a run."""
    calls: list[Call] = []

    make: Callable[..., Launched] = problem.Problem.call

    def keep(self: problem.Problem, kernel: Any, how: Launch, **options: object) -> Callable[..., None]:
        made = make(self, kernel, how, **options)

        def record(*tensors: Tensor | None) -> None:
            named = dict(zip(kernel.arg_names, tensors, strict=False)) | made.constants
            calls.append((kernel, how, named | {"COMPILED": True}))

        return record

    x = torch.empty(1, ROWS, CHANNELS, dtype=dtype)
    log_decay = torch.empty(CHANNELS) if channel else x if gates else None
    offset = x if offsets else None
    terms = () if window is None else (window - 1,)
    initial = torch.empty(1, *terms, 2 + normalise, CHANNELS) if state else None
    bounds = torch.tensor([0, ROWS]) if packed else None
    inputs = x, x, x if mass else None, log_decay, offset, offset, initial, bounds
    forget_plans()
    with patch.object(problem.Problem, "call", keep):
        y, final, states = launch.run_forward(*inputs, normalise, imaginary, state and window is None, window)
        launch.run_backward(y, final if final.numel() else None, *inputs, states, normalise, imaginary, window)
    forget_plans()
    return calls


def compile_call(kernel: Any, how: Launch, arguments: dict[str, Any], architecture: int) -> str:
    """Compile a kernel and return a row of the table."""
    signature, constants, attributes = {}, {}, {}
    for index, (name, parameter) in enumerate(zip(kernel.arg_names, kernel.params, strict=True)):
        value = arguments[name]
        if parameter.is_constexpr or value is None:
            signature[name], constants[(index,)] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name], attributes[(index,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
    start = time.perf_counter()
    compiled = triton.compile(
        ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes),
        target=GPUTarget("cuda", architecture, 32),
        options={"num_warps": how.warps},
    )
    seconds = time.perf_counter() - start
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder, "kernel.cubin")
        binary.write_bytes(compiled.asm["cubin"])
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        usage, code = (
            subprocess.run([tool, option, binary], capture_output=True, text=True, check=True).stdout
            for option in ("-res-usage", "-sass")
        )
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    registers, spilled = found.groups() if found else ("?", "?")
    values = how.rows * how.groups * min(how.channels, arguments["D"]) / (32 * how.warps)
    cells = how.rows, how.groups, how.channels, how.warps, registers, spilled, compiled.metadata.shared / 1024
    row = "".join(f"{cell:>11.4g}" if isinstance(cell, float) else f"{cell!s:>11}" for cell in cells)
    return f"{kernel.fn.__name__:<24}{row}{loop_length(code) / values:>11.1f}{seconds:>9.1f}"


def loop_length(code: str) -> int:
    """Return the instructions of the longest loop of a disassembled kernel."""
    found = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(.+?);", code)
    jumps = [(int(at, 16), re.search(r"\bBRA\S*\s+(?:\S+,\s+)?(?:`\(.*?\)|0x([0-9a-f]+))", text)) for at, text in found]
    lengths = [at - int(jump.group(1), 16) for at, jump in jumps if jump and jump.group(1)]
    return max(lengths, default=0) // 16


def main() -> None:
    """Print a table per type and variant."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", type=int, default=90)
    parser.add_argument("--types", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    options = parser.parse_args()
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # the behaviour of older versions of Triton
    names = "rows", "groups", "channels", "warps", "registers", "spilled", "shared KB", "per value"
    print(f"Triton {triton.__version__}, architecture {options.architecture}")
    for dtype in options.types:
        for variant in options.variants:
            print(f"\n{dtype + ' ' + variant:<24}" + "".join(f"{name:>11}" for name in names) + f"{'seconds':>9}")
            for call in record_calls(getattr(torch, dtype), **VARIANTS[variant]):
                print(compile_call(*call, options.architecture), flush=True)


if __name__ == "__main__":
    main()
