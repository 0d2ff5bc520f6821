"""Tile sizes, warps and precision of the kernels: a fixed table, so nothing is tuned at first use."""

from dataclasses import dataclass, replace
from functools import cache


@dataclass(frozen=True)
class Launch:
    """How a kernel runs: its columns of V, its warps, its pipeline stages.

    The sweeps carry the transposed state, whose rows are columns of V; four warps take 64 rows.
    """

    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Configuration:
    """Positions of a chunk, 32 or 64, the precision of products, and how each kernel runs.

    Attributes:
        chunk: C.
        parts: How products compute with an operand that was computed before, such as the state.
            2: as the sum of two bf16 numbers, which has 16 bits, but for what enters the state only once. The state
            adds up roundings over a thousand positions: in one bf16 number, errors of outputs and gradients pass 1 %
            where beta is 2 and the log-decay -0.001.
            1: in bf16, but for the writes. For betas of at most 1, where later writes wipe out the errors of earlier
            ones; they stay below 0.5 % then.
            0: in fp32, as three products of tf32; the tensors between the kernels are then fp32 too.
        prepare: How `prepare_chunks` runs; it has no columns of V.
        outputs: How `compute_outputs` runs.
        sweeps: How `sweep_both_ways` runs.
        gradients: How `compute_gradients` runs.
    """

    chunk: int
    parts: int
    prepare: Launch
    outputs: Launch
    sweeps: Launch
    gradients: Launch


# Keys: the major number of the architecture, whether the inputs are bf16, the widest K. 9 is Hopper; 0 is every other
# one, which may have only 100 KB of shared memory. Errors are largest where K is small: few keys write over each other.
# fp16 counts as fp32: it has no numbers as small as a state under strong decay. On Hopper and for bf16 the launches at
# widths of 64 and 128 are the fastest of benchmarks/gated_delta_configurations.py, where a GPU has enough to do;
# `Problem.fill` narrows them.
TABLE = {
    (9, True, 48): Configuration(32, 0, Launch(0, 4, 2), Launch(16, 4, 2), Launch(16, 4, 2), Launch(16, 4, 2)),
    (9, True, 64): Configuration(64, 2, Launch(0, 1, 2), Launch(128, 8, 3), Launch(128, 8, 3), Launch(64, 4, 2)),
    (9, True, 128): Configuration(64, 2, Launch(0, 2, 2), Launch(128, 8, 3), Launch(128, 8, 2), Launch(64, 8, 3)),
    (9, True, 256): Configuration(64, 2, Launch(0, 2, 2), Launch(32, 8, 2), Launch(32, 8, 2), Launch(64, 8, 2)),
    (9, False, 256): Configuration(32, 0, Launch(0, 8, 1), Launch(16, 8, 1), Launch(16, 8, 1), Launch(16, 8, 1)),
    (0, True, 48): Configuration(32, 0, Launch(0, 4, 1), Launch(16, 4, 1), Launch(16, 4, 1), Launch(16, 4, 1)),
    (0, True, 256): Configuration(32, 2, Launch(0, 8, 1), Launch(16, 8, 1), Launch(16, 8, 1), Launch(16, 8, 1)),
    (0, False, 256): Configuration(32, 0, Launch(0, 8, 1), Launch(16, 8, 1), Launch(16, 8, 1), Launch(16, 8, 1)),
}
# Where betas never exceed 1
TO_ONE = {
    (9, True, 64): Configuration(64, 1, Launch(0, 1, 2), Launch(64, 4, 3), Launch(128, 8, 3), Launch(64, 4, 2)),
    (9, True, 128): Configuration(64, 1, Launch(0, 1, 2), Launch(128, 8, 3), Launch(128, 8, 3), Launch(64, 8, 3)),
    (9, True, 256): replace(TABLE[9, True, 256], parts=1),
    (0, True, 256): replace(TABLE[0, True, 256], parts=1),
}


@cache
def configuration(major: int, half: bool, width: int, negative: bool) -> Configuration:
    """Return how to run for an architecture, bf16 inputs or others, a width K, and betas up to 2 or up to 1."""
    table = TABLE if negative else TABLE | TO_ONE
    known = [key for key in table if key[0] in (major, 0) and key[1] == half and width <= key[2]]
    return table[min(known, key=lambda key: (-key[0], key[2]))]
