"""Tile sizes and warps of the kernels: a fixed table, so nothing is tuned at first use."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Launch:
    """How a kernel runs.

    Attributes:
        rows: Rows of a group, R, that one thread has.
        groups: Groups of a tile, G.
        channels: Channels of a program, BD.
        warps: Warps of a program.
        stages: Tiles that it loads ahead, and one.
    """

    rows: int
    groups: int
    channels: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Configuration:
    """How the forward and the backward run; both have tiles of the same length, since the state before each tile is kept."""

    forward: Launch
    backward: Launch


# Keys: whether the values have 16 bits. Four threads have the channels of a row, so a warp has eight groups.
TABLE = {
    False: Configuration(Launch(8, 8, 16, 1, 3), Launch(4, 16, 16, 2, 2)),
    True: Configuration(Launch(8, 8, 32, 1, 3), Launch(4, 16, 32, 2, 2)),
}
