"""Tile sizes and warps of the kernels: a fixed table, so nothing is tuned at first use."""

from dataclasses import dataclass, replace


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
    """How the forward and the backward run, with tiles of the same length: the state before each tile is kept."""

    forward: Launch
    backward: Launch


WINDOW = 3  # in a key: there is a window

# Keys: bytes of a value, and how many there are of: masses, decays, offsets and normalisation; 2 stands for more, too.
# One warp per program needs no barriers for its scans. More rows of a group need fewer instructions per value; more
# values of a thread need more registers than there are.
TABLE = {
    (4, 0): Configuration(Launch(8, 8, 16, 1, 3), Launch(16, 4, 16, 1, 2)),
    (4, 1): Configuration(Launch(4, 8, 16, 1, 3), Launch(4, 8, 16, 1, 3)),
    (2, 0): Configuration(Launch(8, 8, 16, 1, 3), Launch(8, 8, 16, 1, 3)),
    (2, 1): Configuration(Launch(8, 4, 16, 1, 3), Launch(8, 4, 16, 1, 3)),
} | {
    (size, extras): Configuration(Launch(4, 8, 16, 1, 3), Launch(4, 8, 16, 1, 2))
    for size in (4, 2)
    for extras in (2, WINDOW)
}


def window_tiles(launch: Launch, window: int) -> tuple[Launch, int, int]:
    """Return the launch with a window, the rows L of a tile, and the tiles Q of a chunk; see `window_tiles.py`.

    A group has no more rows than such a tile needs.
    """
    most = launch.rows * launch.groups
    per_chunk = -(-window // most)
    rows = most // window * window if per_chunk == 1 else -(-window // per_chunk)
    return replace(launch, rows=-(-rows // launch.groups)), rows, per_chunk
