"""Arrays [rows, D] held in parts: a tuple of [rows, PART], one for each PART columns.

Of a wide array in one piece a thread loads a little of many rows, and has to keep the address of
each; of parts it loads more of fewer rows. And a product in parts can be stored part by part, so
that never all of it is in registers.
"""

# pyright: reportCallIssue=false

from typing import no_type_check

import triton
import triton.language as tl


@triton.jit
@no_type_check
def columns(ptr, rows, live, i: tl.constexpr, D: tl.constexpr, PART: tl.constexpr):
    """Where part i of rows of a [*, D] array lies, and what of it there is."""
    offs_d = i * PART + tl.arange(0, PART)
    mask = live[:, None]
    if (i + 1) * PART > D:
        mask = mask & (offs_d < D)[None, :]
    return ptr + rows[:, None] * D + offs_d[None, :], mask


@triton.jit
@no_type_check
def load_parts(ptr, rows, live, D: tl.constexpr, PART: tl.constexpr):
    """Rows of a [*, D] array, 0 where not live and beyond D."""
    parts = ()
    for i in tl.static_range((D + PART - 1) // PART):
        where, mask = columns(ptr, rows, live, i, D, PART)
        parts += (tl.load(where, mask=mask, other=0.0),)
    return parts


@triton.jit
@no_type_check
def store_part(ptr, rows, live, x, i: tl.constexpr, D: tl.constexpr, PART: tl.constexpr):
    """x as part i of rows; casts to the array's dtype."""
    where, mask = columns(ptr, rows, live, i, D, PART)
    tl.store(where, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def store_parts(ptr, rows, live, parts, D: tl.constexpr, PART: tl.constexpr):
    """The counterpart of load_parts."""
    for i in tl.static_range(len(parts)):
        store_part(ptr, rows, live, parts[i], i, D, PART)


@triton.jit
@no_type_check
def zero_parts(ROWS: tl.constexpr, D: tl.constexpr, PART: tl.constexpr):
    """Zeros to sum in, float32."""
    parts = ()
    for _ in tl.static_range((D + PART - 1) // PART):
        parts += (tl.zeros([ROWS, PART], tl.float32),)
    return parts


@triton.jit
@no_type_check
def add_parts(a, b):
    parts = ()
    for i in tl.static_range(len(a)):
        parts += (a[i] + b[i],)
    return parts


@triton.jit
@no_type_check
def inner_products(a, b, PRECISION: tl.constexpr):
    """a bᵀ of two arrays in parts.  [rows of a, rows of b]"""
    x = tl.dot(a[0], tl.trans(b[0]), input_precision=PRECISION)
    for i in tl.static_range(1, len(a)):
        x = tl.dot(a[i], tl.trans(b[i]), x, input_precision=PRECISION)
    return x


@triton.jit
@no_type_check
def add_product(total, x, b, PRECISION: tl.constexpr):
    """total + x b, in parts as b is."""
    parts = ()
    for i in tl.static_range(len(b)):
        parts += (tl.dot(x, b[i], total[i], input_precision=PRECISION),)
    return parts
