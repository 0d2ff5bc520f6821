"""Compare four ways to compute attention to a window: time and memory of forward and backward.

python benchmarks/window_attention.py [--lengths 256 1024] [--windows 16 64] [--bf16] [--json FILE]

- `masked`: `scaled_dot_product_attention` over all pairs of positions, with a mask.
- `blocks`: the same kernel over blocks of about W queries and the twice as many keys that they can see.
- `flash`: FlashAttention, which takes bf16 on a GPU.
- `flex`: FlexAttention, compiled, with a block mask that is made once. On a CPU it has no backward in torch 2.13, so
  that the column is the forward alone.

The input has `--tokens` positions in all, `--heads` heads and a head width of `--width`. Times are medians over
`--repeats` steps. Peak memory is what a step allocates above its input: `torch.cuda.max_memory_allocated`; there is no
such figure on a CPU. The last column is what `WindowAttention` chooses. Before they are measured, outputs and gradients
are compared with those of `masked`, also where half a window of keys comes before the first query.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from lightning_modules.mixers.local_attention import attend_blocks, attend_flash, attend_masked, choose, takes_flash

WARM_UP = 3  # steps before anything is measured
NAMES = ("masked", "blocks", "flash", "flex")
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def flex(length: int, window: int, device: torch.device) -> Attend:
    """Return FlexAttention for rows of one length, compiled."""

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (t >= s) & (t - s < window)

    torch.compiler.reset()  # else later shapes would compile for any shape
    mask = create_block_mask(sees, None, None, length, length, device=str(device))
    attend = partial(torch.compile(flex_attention), block_mask=mask)
    return lambda q, k, v: attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)).transpose(1, 2)


def measure(run: Attend, qkv: list[Tensor], repeats: int) -> dict[str, float]:
    """Return the median milliseconds of a step, and on a GPU its peak memory in MiB."""
    device, times = qkv[0].device, []

    def step() -> None:
        output = run(*qkv)
        if output.requires_grad:
            torch.autograd.grad(output, qkv, output)
        if device.type == "cuda":
            torch.cuda.synchronize()

    for _ in range(WARM_UP):
        step()
    for _ in range(repeats):
        start = time.perf_counter()
        step()
        times.append(time.perf_counter() - start)
    row = {"ms": 1e3 * statistics.median(times)}
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        row["mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row


def results(run: Attend, qkv: list[Tensor]) -> list[Tensor]:
    """Return the output of a way and, where the inputs take them, the gradients."""
    output = run(*qkv)
    return [output, *(torch.autograd.grad(output, qkv, output.detach()) if output.requires_grad else ())]


def compare(length: int, window: int, options: argparse.Namespace, device: torch.device) -> tuple[dict[str, Any], str]:
    """Return the figures of each way, and the name of the chosen one; check that all compute the same."""
    torch.manual_seed(0)
    shape = max(1, options.tokens // length), length, options.heads, options.width
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    qkv = [torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
    fixed = [x.detach() for x in qkv]
    functions = {"masked": attend_masked, "blocks": attend_blocks}
    if takes_flash(qkv[0]):
        functions["flash"] = attend_flash
    ways: dict[str, Attend] = {name: partial(attend, window=window) for name, attend in functions.items()}
    late = [fixed[0][:, window // 2 :], *fixed[1:]]
    for x in (qkv, late):
        expected = results(ways["masked"], x)
        for run in ways.values():
            torch.testing.assert_close(results(run, x), expected, rtol=2e-2, atol=1e-1 if options.bf16 else 1e-4)
    ways["flex"] = flex(length, window, device)
    forward_only = "flex" if device.type == "cpu" else None
    inputs = {name: fixed if name == forward_only else qkv for name in ways}
    torch.testing.assert_close(ways["flex"](*fixed), ways["masked"](*fixed), rtol=2e-2, atol=2e-2)
    chosen = next(way for way, attend in functions.items() if attend is choose(qkv[0], length, window))
    return {name: measure(run, inputs[name], options.repeats) for name, run in ways.items()}, chosen


def main() -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in {"tokens": 4096, "heads": 8, "width": 64, "repeats": 10}.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"default: {default}")
    for name, defaults in {"lengths": [64, 256, 1024, 2048], "windows": [16, 64, 256]}.items():
        parser.add_argument(f"--{name}", type=int, nargs="+", default=defaults, help=f"default: {defaults}")
    parser.add_argument("--bf16", action="store_true", help="bf16 instead of fp32")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the figures to a file")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {torch.get_num_threads()} thread(s)"
    columns = [f"{way}, {unit}" for unit in ("ms", "MiB") for way in NAMES]
    print(" | ".join([f"| T ({name}) | W", *columns, "chosen |"]))
    print("|" + "---|" * (len(columns) + 3))
    figures = []
    for length in options.lengths:
        for window in (window for window in options.windows if window <= length):
            rows, chosen = compare(length, window, options, device)
            cells = [(rows.get(way, {}).get(key), digits) for key, digits in (("ms", 2), ("mib", 0)) for way in NAMES]
            text = ["-" if cell is None else f"{cell:.{digits}f}" for cell, digits in cells]
            print(" | ".join([f"| {length} | {window}", *text, f"{chosen} |"]), flush=True)
            figures.append({"length": length, "window": window, **rows, "chosen": chosen})
    if options.json:
        options.json.write_text(json.dumps({"device": name, "options": str(options), "rows": figures}, indent=2))


if __name__ == "__main__":
    main()
