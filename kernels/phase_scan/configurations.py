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
        stages: Tiles that the backward and windows load ahead, and one; the forward without a window always has one
            tile ahead, in registers.
    """

    rows: int
    groups: int
    channels: int
    warps: int
    stages: int = 1

    @property
    def tile(self) -> int:
        """Rows of a tile."""
        return self.rows * self.groups


@dataclass(frozen=True)
class Configuration:
    """How the forward and the backward run; a tile of the backward is a multiple of the forward's rows of a group."""

    forward: Launch
    backward: Launch


# Keys: bytes of a value, and what there is beside values and phases: "mass" and "channel" have masses and a decay per
# channel alone, "one" has a decay per position, an offset or normalisation, "more" several of these; "window" has a
# window, with the same tiles forward and backward. One warp per program needs no barriers for its scans, several read
# longer pieces of rows. More rows of a group need fewer instructions per value; more values of a thread need more
# registers than there are.
TABLE = {
    (4, "plain"): Configuration(Launch(16, 16, 32, 8), Launch(8, 8, 32, 2, 3)),
    (4, "mass"): Configuration(Launch(8, 8, 32, 4), Launch(4, 16, 32, 4, 3)),
    (4, "channel"): Configuration(Launch(16, 16, 32, 8), Launch(4, 8, 16, 1, 3)),
    (4, "one"): Configuration(Launch(8, 8, 32, 4), Launch(4, 8, 16, 1, 3)),
    (4, "more"): Configuration(Launch(4, 8, 16, 1), Launch(4, 8, 16, 1, 2)),
    (4, "window"): Configuration(Launch(4, 8, 16, 1, 3), Launch(4, 8, 16, 1, 3)),
    (2, "plain"): Configuration(Launch(16, 8, 32, 4), Launch(8, 8, 32, 4, 3)),
    (2, "mass"): Configuration(Launch(16, 8, 32, 4), Launch(8, 8, 32, 4, 3)),
    (2, "channel"): Configuration(Launch(16, 8, 32, 4), Launch(8, 4, 16, 1, 3)),
    (2, "one"): Configuration(Launch(16, 8, 32, 4), Launch(8, 4, 16, 1, 3)),
    (2, "more"): Configuration(Launch(4, 8, 16, 1), Launch(4, 8, 16, 1, 2)),
    (2, "window"): Configuration(Launch(4, 16, 32, 4, 3), Launch(4, 16, 16, 2, 3)),
}


def window_tiles(launch: Launch, window: int) -> tuple[Launch, int, int]:
    """Return the launch with a window, the rows L of a tile, and the tiles Q of a chunk; see `window_tiles.py`.

    A group has no more rows than such a tile needs.
    """
    most = launch.tile
    per_chunk = -(-window // most)
    rows = most // window * window if per_chunk == 1 else -(-window // per_chunk)
    return replace(launch, rows=-(-rows // launch.groups)), rows, per_chunk
