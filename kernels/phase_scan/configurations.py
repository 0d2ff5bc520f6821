"""Tile sizes and warps of the kernels: a fixed table, so nothing is tuned at first use."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """How a kernel runs: rows and channels of a tile, warps of a program, and tiles that it loads ahead."""

    rows: int
    channels: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Configuration:
    """How the forward and the backward run; both have the same rows, since the state before each tile is kept."""

    forward: Launch
    backward: Launch


# Keys: whether the values have 16 bits. A warp loads rows of 128 bytes in either case.
TABLE = {
    False: Configuration(Launch(64, 32, 4, 3), Launch(64, 32, 4, 2)),
    True: Configuration(Launch(64, 64, 8, 3), Launch(64, 64, 8, 2)),
}
