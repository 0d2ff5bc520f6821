"""Time the phase scan kernels on a GPU with other tile sizes than those of the table in `configurations.py`.

python -m benchmarks.phase_scan_configurations [--shape 8,4096,1024] [--types float32 bfloat16]
    [--variants plain mass channel input window] [--window 64] [--launches 8,8,16,1,3 ...] [--repeats 20]

A launch is the rows of a group, groups, channels, warps and stages. The forward and the backward both have it. Each row
is the median time of the forward, and of forward and backward, replayed as CUDA graphs; the row with a star is that of
the table. On a CPU, which runs the reference, all rows are the same computation.
"""

import argparse

import torch
from torch import Tensor

from benchmarks.phase_scan_peers import VARIANTS, inputs, ours
from benchmarks.timing import DEVICE, graph_milliseconds, milliseconds
from kernels.phase_scan.configurations import TABLE, Configuration, Launch
from kernels.phase_scan.launch import forget_plans

LAUNCHES = [
    *("8,8,16,1,3", "8,4,16,1,3", "4,8,16,1,3", "4,8,16,1,2", "4,16,16,2,3", "8,16,16,2,3", "16,8,16,2,3"),
    *("4,16,32,4,3", "8,8,32,2,3", "8,8,32,4,3", "8,16,32,4,3", "16,4,32,2,3", "16,8,32,4,3", "16,16,32,8,3"),
]


def times(values: dict[str, Tensor], window: int | None, repeats: int) -> tuple[float, float]:
    """Return the milliseconds of the forward, and of forward and backward."""
    cotangent = torch.randn_like(values["x"])

    def forward() -> Tensor:
        with torch.no_grad():
            return ours(window=window, **values)

    def both() -> object:
        return torch.autograd.grad(ours(window=window, **values), list(values.values()), cotangent)

    measure = graph_milliseconds if DEVICE == "cuda" else milliseconds
    return measure(forward, repeats), measure(both, repeats)


def main() -> None:
    """Print a table per type and variant, the fastest forward and backward first."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="8,4096,1024")
    parser.add_argument("--types", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--window", type=int, default=64, help="positions, in the variant of this name")
    parser.add_argument("--launches", nargs="+", default=LAUNCHES)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args()
    B, T, D = map(int, options.shape.split(","))
    for name in options.types:
        for variant in options.variants:
            dtype = getattr(torch, name)
            values = inputs(variant, B, T, D, dtype, DEVICE)
            window = options.window if variant == "window" else None
            key = dtype.itemsize, "one" if variant == "input" else variant
            before, rows = TABLE[key], []
            for launch in [Launch(*map(int, text.split(","))) for text in options.launches]:
                TABLE[key] = Configuration(launch, launch)
                forget_plans()
                star = " *" if launch == before.forward else ""
                rows.append((*times(values, window, options.repeats), f"{launch}{star}"))
            TABLE[key] = before
            forget_plans()
            print(f"\n{options.shape} {name} {variant}\n{'forward ms':>12}{'both ms':>12}")
            for forward, both, label in sorted(rows, key=lambda row: row[1]):
                print(f"{forward:>12.3f}{both:>12.3f}  {label}", flush=True)


if __name__ == "__main__":
    main()
