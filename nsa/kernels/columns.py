"""Wide arrays [rows, D] as slices: a tuple of arrays [rows, WIDTH], one for each WIDTH columns.

A tile's width is a power of two, and slices fit a width that is none: 192 columns are a slice of
128 and one of 64, where one piece would be 256, a quarter of it zeros.

A thread that loads a wide array in one piece loads a little of many rows, and has to keep the
address of each. In slices it loads more of fewer rows. A product in slices can also be stored slice
by slice, so that it is never in registers as a whole.
"""

# pyright: reportGeneralTypeIssues=false

import triton
import triton.language as tl

from nsa.kernels.jit import jit
from nsa.kernels.primitives import padded


@triton.constexpr_function
def slice_width(i, D, WIDTH):
    """Columns of slice i: WIDTH, but 64 where the last one needs no more."""
    return WIDTH if D - i * WIDTH > 64 else min(WIDTH, 64)


def key_slices(D: int) -> list[int]:
    """The width of every slice of queries and keys: most are one, padded."""
    return [128, 64] if 128 < D <= 192 else [padded(D)]


def key_slice(D: int) -> int:
    """WIDTH of queries and keys."""
    return key_slices(D)[0]


@jit
def columns(ptr, rows, live, i: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to slice i of rows of a [*, D] array, and the mask of what exists."""
    N: tl.constexpr = slice_width(i, D, WIDTH)
    offs_d = i * WIDTH + tl.arange(0, N)
    mask = live[:, None]
    if i * WIDTH + N > D:
        mask = mask & (offs_d < D)[None, :]
    return ptr + rows[:, None] * D + offs_d[None, :], mask


@jit
def load_column(ptr, rows, live, i: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Slice i of rows of a [*, D] array, 0 where not live and beyond D."""
    where, mask = columns(ptr, rows, live, i, D, WIDTH)
    return tl.load(where, mask=mask, other=0.0)


@jit
def load_columns(ptr, rows, live, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a [*, D] array, 0 where not live and beyond D."""
    slices = ()
    for i in tl.static_range((D + WIDTH - 1) // WIDTH):
        slices += (load_column(ptr, rows, live, i, D, WIDTH),)
    return slices


@jit
def store_column(ptr, rows, live, x, i: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """x as slice i of rows; casts to the array's dtype."""
    where, mask = columns(ptr, rows, live, i, D, WIDTH)
    tl.store(where, x.to(ptr.dtype.element_ty), mask=mask)


@jit
def store_columns(ptr, rows, live, slices, D: tl.constexpr, WIDTH: tl.constexpr):
    """The counterpart of load_columns."""
    for i in tl.static_range(len(slices)):
        store_column(ptr, rows, live, slices[i], i, D, WIDTH)


@jit
def zero_columns(ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Zeros to sum in, float32."""
    slices = ()
    for i in tl.static_range((D + WIDTH - 1) // WIDTH):
        slices += (tl.zeros([ROWS, slice_width(i, D, WIDTH)], tl.float32),)
    return slices


@jit
def add_columns(a, b):
    slices = ()
    for i in tl.static_range(len(a)):
        slices += (a[i] + b[i],)
    return slices


@jit
def scale_columns(a, factor):
    slices = ()
    for i in tl.static_range(len(a)):
        slices += (a[i] * factor,)
    return slices


@jit
def inner_products(a, b, PRECISION: tl.constexpr):
    """a bᵀ of two sliced arrays.  [rows of a, rows of b]"""
    x = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        x = tl.dot(a[i], tl.trans(b[i]), x, input_precision=PRECISION)
    return x


@jit
def add_product(total, x, b, PRECISION: tl.constexpr):
    """total + x b, sliced as b is."""
    slices = ()
    for i in tl.static_range(len(b)):
        slices += (tl.dot(x, b[i], total[i], input_precision=PRECISION),)
    return slices
