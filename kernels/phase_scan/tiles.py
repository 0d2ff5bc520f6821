# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators
# mypy: disable-error-code="import-untyped, assignment"
"""Rows, channels and groups of tiles: where they lie, and how they are loaded and stored.

A tile has C = G R rows in G groups of R: group g has the rows g R to g R + R - 1. The kernels hold it as R tiles
[G, BD], one per place r in a group, in a tuple named with RGD. A thread has the same group in all of them, so a scan
over the rows of a group is a loop in the program, without shuffles and barriers. Only the scan over groups, of one
number per R rows, is one of Triton's.
"""

import triton
import triton.language as tl


@triton.jit
def columns_of(column, BD: tl.constexpr):
    """Return the channels of a program, [1, BD]; a thread gets four of eight groups, or two of four, in one load."""
    return tl.max_contiguous(column + tl.arange(0, BD), 4)[None, :]


@triton.jit
def rows_at(r, R: tl.constexpr, G: tl.constexpr):
    """Return the rows at place r of the groups, [G, 1]."""
    return (tl.arange(0, G) * R + r)[:, None]


@triton.jit
def inside_of(rows, columns, left, D: tl.constexpr, BD: tl.constexpr):
    """Return which of the rows and channels exist; without `left`, all rows do."""
    if left is None:
        return (rows >= 0) & (columns < D)
    elif D % BD == 0:
        return rows < left
    else:
        return (rows < left) & (columns < D)


@triton.jit
def load_rows(
    x, r, row, left, column, STRIDE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr
):
    """Load place r of a tile from `row` on, of which `left` rows exist, for BD of D channels; zeros elsewhere."""
    rows = rows_at(r, R, G)
    columns = columns_of(column, BD)
    places = x + row * STRIDE + rows * STRIDE + columns
    if left is None and D % BD == 0:
        return tl.load(places)
    else:
        return tl.load(places, mask=inside_of(rows, columns, left, D, BD), other=0.0)


@triton.jit
def store_rows(
    x,
    values,
    r,
    row,
    left,
    column,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
):
    """Store what `load_rows` loads."""
    rows = rows_at(r, R, G)
    columns = columns_of(column, BD)
    places = x + row * STRIDE + rows * STRIDE + columns
    if left is None and D % BD == 0:
        tl.store(places, values.to(x.dtype.element_ty))
    else:
        tl.store(places, values.to(x.dtype.element_ty), mask=inside_of(rows, columns, left, D, BD))


@triton.jit
def load_channels(x, row, column, D: tl.constexpr, G: tl.constexpr, BD: tl.constexpr):
    """Load BD channels of a row in fp32 for each group, [G, BD], as the kernels hold tiles: no barrier is needed."""
    columns = columns_of(column, BD) + tl.zeros([G, 1], tl.int32)
    return tl.load(x + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def store_channels(x, values, row, column, D: tl.constexpr, G: tl.constexpr, BD: tl.constexpr):
    """Store BD channels of a row, [1, BD] or the first group of [G, BD].

    Their bits may be those of an integer, so nothing is added to them: a sum has other bits where they look like a NaN.
    """
    columns = columns_of(column, BD) + tl.zeros([G, 1], tl.int32)
    inside = (tl.arange(0, G) == 0)[:, None] & (columns < D)
    tl.store(x + row * D + columns, tl.broadcast_to(values, [G, BD]), mask=inside)


@triton.jit
def keep_rows(
    states,
    last_GD,
    slot,
    part,
    PARTS: tl.constexpr,
    done,
    length,
    column,
    KEEP: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
):
    """Store one part of the states after the last rows of groups, where a multiple of KEEP rows of the sequence ends.

    The tile begins after `done` of `length` rows, and R divides KEEP. Nothing is kept after the last row.
    """
    end = done + (tl.arange(0, G) + 1) * R
    places = states + ((slot + end // KEEP) * PARTS + part)[:, None] * D + columns_of(column, BD)
    kept = ((end % KEEP == 0) & (end < length))[:, None]
    tl.store(places, last_GD, mask=kept & (columns_of(column, BD) < D))


@triton.jit
def group_of(x, g: tl.constexpr, G: tl.constexpr):
    """Return one group of [G, BD], as [1, BD]."""
    return tl.sum(tl.where((tl.arange(0, G) == g)[:, None], x, 0), 0, keep_dims=True)
