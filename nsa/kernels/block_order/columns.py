"""Arrays [rows, D] held in parts: a tuple of [rows, WIDTH], one for each WIDTH columns.

Of a wide array in one piece a thread loads a little of many rows, and has to keep the address of
each; of parts it loads more of fewer rows. And a product in parts can be stored part by part, so
that never all of it is in registers.
"""

# pyright: reportGeneralTypeIssues=false

import triton.language as tl

from nsa.kernels.jit import jit


@jit
def columns(ptr, rows, live, i: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Where part i of rows of a [*, D] array lies, and what of it there is."""
    offs_d = i * WIDTH + tl.arange(0, WIDTH)
    mask = live[:, None]
    if (i + 1) * WIDTH > D:
        mask = mask & (offs_d < D)[None, :]
    return ptr + rows[:, None] * D + offs_d[None, :], mask


@jit
def load_columns(ptr, rows, live, D: tl.constexpr, WIDTH: tl.constexpr):
    """Rows of a [*, D] array, 0 where not live and beyond D."""
    parts = ()
    for i in tl.static_range((D + WIDTH - 1) // WIDTH):
        where, mask = columns(ptr, rows, live, i, D, WIDTH)
        parts += (tl.load(where, mask=mask, other=0.0),)
    return parts


@jit
def store_column(ptr, rows, live, x, i: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """x as part i of rows; casts to the array's dtype."""
    where, mask = columns(ptr, rows, live, i, D, WIDTH)
    tl.store(where, x.to(ptr.dtype.element_ty), mask=mask)


@jit
def store_columns(ptr, rows, live, parts, D: tl.constexpr, WIDTH: tl.constexpr):
    """The counterpart of load_columns."""
    for i in tl.static_range(len(parts)):
        store_column(ptr, rows, live, parts[i], i, D, WIDTH)


@jit
def zero_columns(ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr):
    """Zeros to sum in, float32."""
    parts = ()
    for _ in tl.static_range((D + WIDTH - 1) // WIDTH):
        parts += (tl.zeros([ROWS, WIDTH], tl.float32),)
    return parts


@jit
def add_columns(a, b):
    parts = ()
    for i in tl.static_range(len(a)):
        parts += (a[i] + b[i],)
    return parts


@jit
def inner_products(a, b, PRECISION: tl.constexpr):
    """a bᵀ of two arrays in parts.  [rows of a, rows of b]"""
    x = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        x = tl.dot(a[i], tl.trans(b[i]), x, input_precision=PRECISION)
    return x


@jit
def add_product(total, x, b, PRECISION: tl.constexpr):
    """total + x b, in parts as b is."""
    parts = ()
    for i in tl.static_range(len(b)):
        parts += (tl.dot(x, b[i], total[i], input_precision=PRECISION),)
    return parts
