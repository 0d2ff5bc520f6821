"""Tile sizes, warps and precision of the kernels: a fixed table, so nothing is tuned at first use."""

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch

LOW = (torch.bfloat16, torch.float16)
Operands = Literal["input", "tf32", "fp32"]


@dataclass(frozen=True)
class Launch:
    """How a kernel runs: its columns of V, its warps, its pipeline stages."""

    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Configuration:
    """Positions of a chunk, 32 or 64, the precision of products, and how each kernel runs.

    Attributes:
        chunk: C.
        operands: What products of computed operands, such as the state, compute with. `input` is the type of the
            inputs: with bf16, errors of outputs and gradients pass 1 % where beta is 2 and the log-decay -0.001, since
            the state then adds up roundings over a thousand positions. `tf32` has 11 bits, `fp32` computes each product
            as three of tf32 and also keeps the states between the kernels of the backward in fp32.
        prepare: How `prepare_chunks` runs; it has no columns of V.
        outputs: How `compute_outputs` runs.
        sweeps: How `sweep_both_ways` runs.
        gradients: How `compute_gradients` runs.
    """

    chunk: int
    operands: Operands
    prepare: Launch
    outputs: Launch
    sweeps: Launch
    gradients: Launch


# Keys: the major number of the architecture, whether inputs have 16 bits, the widest K. 9 is Hopper; 0 is every other
# one, which may have only 100 KB of shared memory. Errors are largest where K is small: few keys write over each other.
TABLE = {
    (9, True, 32): Configuration(32, "fp32", Launch(0, 4, 2), Launch(32, 4, 2), Launch(32, 4, 2), Launch(32, 4, 2)),
    (9, True, 64): Configuration(64, "tf32", Launch(0, 4, 2), Launch(32, 4, 2), Launch(32, 4, 2), Launch(64, 8, 2)),
    (9, True, 128): Configuration(64, "tf32", Launch(0, 4, 2), Launch(32, 8, 2), Launch(32, 8, 2), Launch(32, 8, 2)),
    (9, True, 256): Configuration(32, "tf32", Launch(0, 4, 2), Launch(32, 8, 2), Launch(32, 8, 2), Launch(32, 8, 2)),
    (9, False, 64): Configuration(32, "fp32", Launch(0, 4, 2), Launch(32, 4, 2), Launch(32, 4, 2), Launch(32, 4, 2)),
    (9, False, 256): Configuration(32, "fp32", Launch(0, 4, 1), Launch(16, 8, 1), Launch(16, 8, 1), Launch(16, 8, 1)),
    (0, True, 32): Configuration(32, "fp32", Launch(0, 4, 2), Launch(32, 4, 2), Launch(32, 4, 2), Launch(32, 4, 2)),
    (0, True, 64): Configuration(64, "tf32", Launch(0, 4, 2), Launch(32, 4, 1), Launch(32, 4, 1), Launch(32, 8, 1)),
    (0, True, 256): Configuration(32, "tf32", Launch(0, 4, 1), Launch(16, 8, 1), Launch(16, 8, 1), Launch(16, 8, 1)),
    (0, False, 256): Configuration(32, "fp32", Launch(0, 4, 1), Launch(16, 8, 1), Launch(16, 8, 1), Launch(16, 8, 1)),
}


@cache
def configuration(major: int, low: bool, width: int) -> Configuration:
    """Return the row of the table for an architecture, 16-bit inputs or not, and a width K."""
    known = [key for key in TABLE if key[0] in (major, 0) and key[1] == low and width <= key[2]]
    return TABLE[min(known, key=lambda key: (-key[0], key[2]))]
