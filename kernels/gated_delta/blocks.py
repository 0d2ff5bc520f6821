# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""Square matrices over the positions of a chunk, cut into blocks.

A block-diagonal matrix is a batch [B, S, S] of its blocks: products then leave out the zeros between the blocks. A
batch lies in the registers of each thread, so to pick, join or split blocks moves nothing between threads.
"""

import triton
import triton.language as tl

from kernels.gated_delta.tiles import split


@triton.jit
def load_blocks(
    x,
    first,
    left,
    column,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    B: tl.constexpr,
    STEP: tl.constexpr,
    S: tl.constexpr,
    W: tl.constexpr,
):
    """Load W of WIDTH columns of B blocks of S rows, STEP rows apart, from row `first` on; missing elements are 0."""
    rows = first + tl.arange(0, B)[:, None] * STEP + tl.arange(0, S)[None, :]
    columns = column + tl.arange(0, W)
    inside = (rows < left)[:, :, None]
    if WIDTH % W != 0:
        inside = inside & (columns < WIDTH)[None, None, :]
    return tl.load(x + rows[:, :, None] * STRIDE + columns[None, None, :], mask=inside, other=0.0)


@triton.jit
def store_blocks(matrix, x, row, column, C: tl.constexpr, PARTS: tl.constexpr):
    """Store B blocks along the diagonal of a matrix [C, C], the first at row and column; twice if PARTS is 2."""
    STEP: tl.constexpr = C // x.shape[0]
    b = tl.arange(0, x.shape[0])[:, None, None] * STEP
    rows = row + b + tl.arange(0, x.shape[1])[None, :, None]
    matrix += rows * C + column + b + tl.arange(0, x.shape[2])[None, None, :]
    if PARTS == 2:
        high, low = split(x, matrix.dtype.element_ty)
        tl.store(matrix, high)
        tl.store(matrix + C * C, low)
    else:
        tl.store(matrix, x.to(matrix.dtype.element_ty))


@triton.jit
def halves(x, R: tl.constexpr):
    """Return the first and the second of each pair of blocks of R, of matrices [2 B, R, R] or of a vector of any shape.

    They have the shapes [B, R, R] and [B, R].
    """
    if len(x.shape) == 3:
        return tl.split(tl.trans(tl.reshape(x, [x.shape[0] // 2, 2, R, R]), 0, 2, 3, 1))
    else:
        return tl.split(tl.trans(tl.reshape(x, [x.numel // (2 * R), 2, R]), 0, 2, 1))


@triton.jit
def beside(x, y):
    """Return a batch of matrices with x on the left and y on the right."""
    return tl.reshape(tl.trans(tl.join(x, y), 0, 1, 3, 2), [x.shape[0], x.shape[1], 2 * x.shape[2]])


@triton.jit
def above(x, y):
    """Return a batch of matrices with x above y."""
    return tl.reshape(tl.trans(tl.join(x, y), 0, 3, 1, 2), [x.shape[0], 2 * x.shape[1], x.shape[2]])


@triton.jit
def inverse(m, S: tl.constexpr, LEVELS: tl.constexpr, PARTS: tl.constexpr):
    """Return (I + m)^-1 for a batch of strictly lower m [B, S, S], with S = 2^LEVELS, from blocks of 2 to one of S.

    Two neighbouring blocks with inverses A (block-diagonal) and a lower corner L join to A - A L A. That is block
    substitution: unlike powers of m it loses no digits where the entries of m are large. Products of tf32 have eleven
    bits. Where the inverse is kept in two parts, a step of Newton's method follows, a - a ((I + m) a - I), whose inner
    product is exact to fp32. Without it the state is wrong by 1 % after a thousand positions where beta is 2 and
    nothing decays.
    """
    PRECISION: tl.constexpr = "tf32x3" if PARTS == 0 else "tf32"
    i = tl.arange(0, S)[None, :, None]
    j = tl.arange(0, S)[None, None, :]
    a = tl.where(i == j, 1.0, 0.0) - tl.where((i >> 1) == (j >> 1), m, 0.0)
    for level in tl.static_range(1, LEVELS):
        corner = ((i >> (level + 1)) == (j >> (level + 1))) & ((i >> level) != (j >> level))
        half = tl.dot(a, tl.where(corner, m, 0.0), input_precision=PRECISION)
        a -= tl.dot(half, a, input_precision=PRECISION)
    if PARTS == 2:
        rest = a - tl.where(i == j, 1.0, 0.0) + tl.dot(m, a, input_precision="tf32x3")
        a -= tl.dot(a, rest, input_precision=PRECISION)
    return a
