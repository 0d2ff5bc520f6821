# ruff: noqa: RUF005  (Triton has no unpacking in tuples)
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, assignment"
"""Tiles of the kernels with a window of W rows, and sums over a window without a subtraction in fp32.

Rows are counted in chunks of W, from the first row of a sequence. The last W rows up to row t are those of its chunk up
to t, and those of the chunk before that come after row t - W. So a kernel has two streams: a tile, and the *late* tile
W rows before it. Both are scanned from zero, one forward and one backward.

A window that is longer than a tile has Q tiles of at most L rows in each chunk. A tile and its late tile have the same
places in their chunks, and the sum has the whole tiles between them, too. These are the W rows before the tile without
the late tile; the sum over W rows is carried in fp64, where the sum of a tile comes and goes with the same bits.
Otherwise a tile has L = k W rows, as many chunks as fit, and scans begin again at each chunk; then Q = 1 and nothing is
carried. The first tile of a sequence then has one chunk, so that no late tile begins before the sequence and ends in
it.

Shapes: as in `forward.py`.
"""

import triton
import triton.language as tl

from kernels.phase_scan.scans import scan
from kernels.phase_scan.tiles import rows_at


@triton.jit
def window_slot(n, cu_seqlens, T, W: tl.constexpr, L: tl.constexpr, Q: tl.constexpr, PACKED: tl.constexpr):
    """Return the slot of a sequence's first tile, its first row, its length, and the number of its tiles."""
    if PACKED:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        length = tl.load(cu_seqlens + n + 1).to(tl.int64) - start
        before = start * Q // W if Q > 1 else start // L
        return before + 2 * n, start, length, tile_count(length, W, L, Q)
    else:
        tiles = tile_count(T, W, L, Q)
        return n.to(tl.int64) * tiles, n.to(tl.int64) * T, T, tiles


@triton.jit
def tile_count(length, W: tl.constexpr, L: tl.constexpr, Q: tl.constexpr):
    """Return the number of tiles of a sequence."""
    if Q > 1:
        return length // W * Q + tl.cdiv(length % W, L)
    else:
        return tl.minimum(length, 1) + tl.cdiv(tl.maximum(length - W, 0), L)


@triton.jit
def tile_rows(tile, W: tl.constexpr, L: tl.constexpr, Q: tl.constexpr):
    """Return the first row of a tile in its sequence, and its number of rows if the sequence does not end in it."""
    if Q > 1:
        done = tile % Q * L
        return tile // Q * W + done, tl.minimum(W - done, L)
    else:
        return tl.maximum(W + (tile - 1) * L, 0), tl.where(tile == 0, W, L)


@triton.jit
def chunk_gates(
    W: tl.constexpr, L: tl.constexpr, REVERSE: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr
):
    """Return gates that are 0 where a scan enters a chunk, and 1 elsewhere."""
    gate_RGD = ()
    for r in tl.static_range(R):
        inside = rows_at(r, R, G) % W != (W - 1 if REVERSE else 0)
        gate_RGD = gate_RGD + (tl.where(inside, 1.0, 0.0) + tl.zeros([G, BD], tl.float32),)
    return gate_RGD


@triton.jit
def sums_beside(
    u_RGD,
    REVERSE: tl.constexpr,
    W: tl.constexpr,
    L: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
):
    """Return for each row the sum over the rows before it, or behind it with REVERSE, of its chunk in the tile."""
    zero = tl.zeros([1, BD], tl.float32)
    if L > W:
        sum_RGD, _ = scan(chunk_gates(W, L, REVERSE, R, G, BD), zero, u_RGD, zero, True, REVERSE, R, G)
    else:
        sum_RGD, _ = scan(None, zero, u_RGD, zero, True, REVERSE, R, G)
    return sum_RGD


@triton.jit
def total(u_RGD, R: tl.constexpr):
    """Return the sum over a tile, [1, BD] in fp64, with the same bits wherever the tile is read.

    Adding 0 rounds each value first: else a compiler merges some products with the sum, in each place others.
    """
    sum_GD = u_RGD[0] + 0.0
    for r in tl.static_range(1, R):
        sum_GD += u_RGD[r] + 0.0
    return tl.sum(sum_GD, 0, keep_dims=True).to(tl.float64)


@triton.jit
def phase_at(phase_RGD, place: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """Return the phase at one row of a tile, [1, BD]."""
    row_GD = tl.where((tl.arange(0, G) == place // R)[:, None], phase_RGD[place % R], 0)
    return tl.sum(row_GD, 0, keep_dims=True).to(tl.int64).to(tl.int32)
