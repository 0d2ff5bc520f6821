# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""Loads and stores of the kernels. A tile has C = G R rows as [R, G, BD]: group g has the rows g R to g R + R - 1.

The compiler gives the R rows of a group to one thread, so a scan over them needs neither shuffles nor barriers, and the
scan over groups has one number per R rows.
"""

import triton
import triton.language as tl


@triton.jit
def rows_of_tile(R: tl.constexpr, G: tl.constexpr):
    """Return the rows of a tile, [R, G, 1]."""
    return tl.arange(0, R)[:, None, None] + (tl.arange(0, G) * R)[None, :, None]


@triton.jit
def columns_of_tile(column, BD: tl.constexpr):
    """Return the channels of a program, [1, 1, BD]; a thread gets four, so a warp has eight groups of 16 channels."""
    return tl.max_contiguous(column + tl.arange(0, BD), 4)[None, None, :]


@triton.jit
def load_tile(
    x, row, left, column, STRIDE: tl.constexpr, D: tl.constexpr, R: tl.constexpr, G: tl.constexpr, BD: tl.constexpr
):
    """Load the rows from `row` on, of which `left` exist, and BD of D channels from `column` on; zeros elsewhere."""
    rows = rows_of_tile(R, G)
    columns = columns_of_tile(column, BD)
    inside = rows < left
    if D % BD != 0:
        inside = inside & (columns < D)
    return tl.load(x + row * STRIDE + rows * STRIDE + columns, mask=inside, other=0.0)


@triton.jit
def store_tile(
    x,
    tile,
    row,
    left,
    column,
    STRIDE: tl.constexpr,
    D: tl.constexpr,
    R: tl.constexpr,
    G: tl.constexpr,
    BD: tl.constexpr,
):
    """Store what `load_tile` loads."""
    rows = rows_of_tile(R, G)
    columns = columns_of_tile(column, BD)
    inside = rows < left
    if D % BD != 0:
        inside = inside & (columns < D)
    tl.store(x + row * STRIDE + rows * STRIDE + columns, tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_channels(x, row, column, D: tl.constexpr, BD: tl.constexpr):
    """Load BD channels of a row in fp32, [1, 1, BD]."""
    columns = columns_of_tile(column, BD)
    return tl.load(x + row * D + columns, mask=columns < D, other=0.0).to(tl.float32)


@triton.jit
def store_channels(x, values, row, column, D: tl.constexpr, BD: tl.constexpr):
    """Store what `load_channels` loads."""
    columns = columns_of_tile(column, BD)
    tl.store(x + row * D + columns, values, mask=columns < D)


@triton.jit
def row_of(x, r: tl.constexpr, g: tl.constexpr, R: tl.constexpr, G: tl.constexpr):
    """Return a row of a tile, [1, 1, BD]."""
    x = tl.sum(tl.where(tl.arange(0, R)[:, None, None] == r, x, 0), 0, keep_dims=True)
    return tl.sum(tl.where(tl.arange(0, G)[None, :, None] == g, x, 0), 1, keep_dims=True)


@triton.jit
def ends_of_groups(x, r: tl.constexpr, R: tl.constexpr):
    """Return row r of each group, [1, G, BD]."""
    return tl.sum(tl.where(tl.arange(0, R)[:, None, None] == r, x, 0), 0, keep_dims=True)
