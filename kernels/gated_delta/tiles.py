# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, disable-error-code="import-untyped"
"""Pieces of the kernels: the rows of a chunk, loads and stores of tiles, decays, the inverse of a triangular matrix.

Each chunk has a slot. Without `cu_seqlens`, sequence n has the slots n M to (n + 1) M - 1, for M chunks. With it,
sequence n begins at slot cu_seqlens[n] // C + n: slots never overlap, their number T // C + N does not depend on the
lengths, which only the GPU knows, and some stay empty.
"""

import triton
import triton.language as tl

# The rows of a chunk's factors, by which the kernels scale rows and columns of products; `reference.py` has the symbols
LOG_DECAY = tl.constexpr(0)  # c, to the base 2
NORM_Q = tl.constexpr(1)  # 1 / |q|, or 1 without a norm
NORM_K = tl.constexpr(2)  # 1 / |k|, or 1
QUERY = tl.constexpr(3)  # scale exp(c) / |q|: a query reads the state
READ = tl.constexpr(4)  # exp(c) / |k|: a key reads the state
WRITE = tl.constexpr(5)  # beta exp(c_last - c) / |k|: a key writes to the state
FACTOR_COUNT = tl.constexpr(6)


@triton.jit
def first_slot(n, cu_seqlens, T, C: tl.constexpr, PACKED: tl.constexpr):
    """Return the slot of a sequence's first chunk, its first row, and its length."""
    if PACKED:
        start = tl.load(cu_seqlens + n).to(tl.int64)
        return start // C + n, start, tl.load(cu_seqlens + n + 1).to(tl.int64) - start
    else:
        return n.to(tl.int64) * tl.cdiv(T, C), n.to(tl.int64) * T, T


@triton.jit
def rows_of(slot, cu_seqlens, N, T, C: tl.constexpr, PACKED: tl.constexpr):
    """Return the first row of a chunk and the number of rows from there to the end of its sequence, if any."""
    if PACKED:
        low = slot * 0
        high = low + N
        while high - low > 1:  # the last sequence that begins at this slot or before
            middle = (low + high) // 2
            if tl.load(cu_seqlens + middle) // C + middle <= slot:
                low = middle
            else:
                high = middle
        n = low
    else:
        n = slot // tl.cdiv(T, C)
    first, start, length = first_slot(n, cu_seqlens, T, C, PACKED)
    done = (slot - first) * C
    return start + done, length - done


@triton.jit
def _places(
    left, column, STRIDE: tl.constexpr, WIDTH: tl.constexpr, R: tl.constexpr, W: tl.constexpr, TRANSPOSED: tl.constexpr
):
    """Return the offsets of a tile's elements from its first row, in 32 bits, and a mask of those that exist."""
    rows = tl.arange(0, R)
    columns = column + tl.arange(0, W)
    if TRANSPOSED:
        at = rows[None, :] * STRIDE + columns[:, None]
        inside = (rows < left)[None, :]
        if WIDTH % W != 0:
            inside = inside & (columns < WIDTH)[:, None]
    else:
        at = rows[:, None] * STRIDE + columns[None, :]
        inside = (rows < left)[:, None]
        if WIDTH % W != 0:
            inside = inside & (columns < WIDTH)[None, :]
    return at, inside


@triton.jit
def load_tile(
    x,
    row,
    left,
    column,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
):
    """Load R rows, of which `left` exist, and W of WIDTH columns from `column` on; missing elements are 0.

    TRANSPOSED: as [W, R].
    """
    at, inside = _places(left, column, STRIDE, WIDTH, R, W, TRANSPOSED)
    return tl.load(x + row * STRIDE + at, mask=inside, other=0.0)


@triton.jit
def store_tile(
    x,
    tile,
    row,
    left,
    column,
    STRIDE: tl.constexpr,
    WIDTH: tl.constexpr,
    R: tl.constexpr,
    W: tl.constexpr,
    TRANSPOSED: tl.constexpr = False,
):
    """Store what `load_tile` loads."""
    at, inside = _places(left, column, STRIDE, WIDTH, R, W, TRANSPOSED)
    tl.store(x + row * STRIDE + at, tile.to(x.dtype.element_ty), mask=inside)


@triton.jit
def load_gate(x, row, left, STRIDE: tl.constexpr, R: tl.constexpr):
    """Load one number per row, in fp32; zeros where there is no row."""
    rows = tl.arange(0, R)
    return tl.load(x + row * STRIDE + rows * STRIDE, mask=rows < left, other=0.0).to(tl.float32)


@triton.jit
def load_factor(factors, at, FACTOR: tl.constexpr, C: tl.constexpr):
    """Load one factor of a chunk's positions."""
    return tl.load(factors + (at * FACTOR_COUNT + FACTOR) * C + tl.arange(0, C))


@triton.jit
def store_factors(factors, at, i, c, norm_q, norm_k, beta_k, last, scale, C: tl.constexpr):
    """Store the factors of positions i; `beta_k` is beta / |k|, and `last` is c of the chunk's last position."""
    factors += at * FACTOR_COUNT * C + i
    decay = tl.exp2(c)
    tl.store(factors + LOG_DECAY * C, c)
    tl.store(factors + NORM_Q * C, norm_q)
    tl.store(factors + NORM_K * C, norm_k)
    tl.store(factors + QUERY * C, decay * norm_q * scale)
    tl.store(factors + READ * C, decay * norm_k)
    tl.store(factors + WRITE * C, tl.exp2(last - c) * beta_k)


@triton.jit
def masked_exp2(x, inside):
    """Return 2^x, 0 outside the mask; masked before, since 2^x would overflow."""
    return tl.exp2(tl.where(inside, x, float("-inf")))


@triton.jit
def split(x, type):
    """Return x as a sum of two numbers of 16 bits."""
    high = x.to(type)
    return high, (x - high.to(tl.float32)).to(type)


@triton.jit
def product(x, b, start, PARTS: tl.constexpr):
    """Return start + x b for a computed x in fp32 and a `b` from memory; `configurations.py` explains PARTS."""
    if PARTS == 0:
        return tl.dot(x, b.to(tl.float32), start, input_precision="tf32x3")
    elif PARTS == 1:
        return tl.dot(x.to(b.dtype), b, start)
    else:
        high, low = split(x, b.dtype)
        return tl.dot(high, b, tl.dot(low, b, start))


@triton.jit
def load_square(x, C: tl.constexpr):
    """Load a square of C positions."""
    i = tl.arange(0, C)
    return tl.load(x + i[:, None] * C + i[None, :])


@triton.jit
def product_inverse(x, A, TRANSPOSED: tl.constexpr, C: tl.constexpr, PARTS: tl.constexpr):
    """Return x A, or x A^T, for a computed x in fp32 and the stored A of a chunk."""
    a = load_square(A, C)
    if TRANSPOSED:
        a = tl.trans(a)
    y = tl.zeros(x.shape, tl.float32)
    if PARTS == 2:
        rest = load_square(A + C * C, C)
        if TRANSPOSED:
            rest = tl.trans(rest)
        y = tl.dot(x.to(rest.dtype), rest, y)
    return product(x, a, y, PARTS)
