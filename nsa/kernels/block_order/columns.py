"""Wide arrays [rows, D] as slices: a tuple of arrays [rows, WIDTH], one for each WIDTH columns.

A thread that loads a wide array in one piece loads a little of many rows, and has to keep the
address of each. In slices it loads more of fewer rows. A product in slices can also be stored slice
by slice, so that it is never in registers as a whole.
"""

# pyright: reportGeneralTypeIssues=false

import triton.language as tl

from nsa.kernels.jit import jit


@jit
def columns(ptr, rows, live, i: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Pointers to slice i of rows of a [*, D] array, and the mask of what exists."""
    offs_d = i * WIDTH + tl.arange(0, WIDTH)
    mask = live[:, None]
    if (i + 1) * WIDTH > D:
        mask = mask & (offs_d < D)[None, :]
    return ptr + rows[:, None] * D + offs_d[None, :], mask


@jit
def load_columns(ptr, rows, live, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a [*, D] array, 0 where not live and beyond D."""
    slices = ()
    for i in tl.static_range((D + WIDTH - 1) // WIDTH):
        where, mask = columns(ptr, rows, live, i, D, WIDTH)
        slices += (tl.load(where, mask=mask, other=0.0),)
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
    for _ in tl.static_range((D + WIDTH - 1) // WIDTH):
        slices += (tl.zeros([ROWS, WIDTH], tl.float32),)
    return slices


@jit
def add_columns(a, b):
    slices = ()
    for i in tl.static_range(len(a)):
        slices += (a[i] + b[i],)
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
