"""Tiles of rows by descriptor: Hopper's tensor memory accelerator (TMA) copies a tile at once.

One thread asks for a tile by its first row; no other computes or keeps an address.
A tile is a box of whole tokens, with one key head or all R query heads of it, of a width that is a
power of two; 192 columns are two boxes (columns.py). What does not suit is loaded by address, row
by row.
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa.kernels.columns import key_slices, load_column
from nsa.kernels.jit import jit
from nsa.kernels.primitives import padded
from nsa.kernels.tile_sizes import capability

LONGEST_BOX = 256  # entries of a tile in any dimension


@jit
def load_tile(
    x, rows, live, b, t, T, head,
    i: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Slice i of a tile of x [B, T, H, D], which begins with token t and `head`.

    By descriptor, rows that are not live are what they are in x; those behind T are 0.
    """
    if DESCRIBED:
        if len(x.block_shape) == 3:
            tile = x.load([(b * T + t).to(tl.int32), head.to(tl.int32), i * WIDTH])
        else:
            tile = x.load([b.to(tl.int32), t, head.to(tl.int32), i * WIDTH])
        return tl.reshape(tile, [rows.shape[0], x.block_shape[-1]])
    else:
        return load_column(x, rows, live, i, D, WIDTH)


@jit
def load_tile_columns(
    x, rest, rows, live, b, t, T, head,
    D: tl.constexpr, WIDTH: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """All slices of such a tile: the first from x, the second, if there are two, from `rest`."""
    slices = (load_tile(x, rows, live, b, t, T, head, 0, D, WIDTH, DESCRIBED),)
    if rest is not None:
        slices += (load_tile(rest, rows, live, b, t, T, head, 1, D, WIDTH, DESCRIBED),)
    return slices


def has_tma(device: torch.device, dtype: torch.dtype) -> bool:
    """Copying by descriptor is for 16-bit tiles: no other has been timed."""
    return dtype.itemsize == 2 and capability(device) >= 90


def as_tiles(rows: int, heads: int, x: Tensor, y: Tensor) -> tuple[bool, Any, Any, Any]:
    """Whether both arrays [B, T, H, D] are described, and as tiles, or as given: x, its second
    slice, if it has two, and y.

    A tile has `rows` rows, `heads` to a token, and must begin with a whole one. x are queries or
    keys, y is in one piece.
    """
    widths, whole = key_slices(x.shape[3]), [padded(y.shape[3])]
    if not (suits(x, rows, heads, widths) and suits(y, rows, heads, whole)):
        return by_address(x, y)
    first, *rest = (describe(x, rows, heads, width) for width in widths)
    return True, first, rest[0] if rest else None, describe(y, rows, heads, *whole)


def by_address(x: Tensor, y: Tensor) -> tuple[bool, Tensor, Tensor | None, Tensor]:
    """What `as_tiles` returns of arrays as given."""
    return False, x, x if len(key_slices(x.shape[3])) > 1 else None, y


def describe(x: Tensor, rows: int, heads: int, width: int) -> TensorDescriptor:
    """In three dimensions, which are faster, unless a tile might reach into the next sequence."""
    B, T = x.shape[:2]
    box = [rows // heads, heads, width]
    if B == 1 or T % box[0] == 0:
        return TensorDescriptor.from_tensor(x.flatten(0, 1), box)
    return TensorDescriptor.from_tensor(x, [1, *box])


def suits(x: Tensor, rows: int, heads: int, widths: list[int]) -> bool:
    return (
        has_tma(x.device, x.dtype)
        and x.numel() > 0
        and all(each * x.element_size() % 16 == 0 for each in x.stride()[:-1])
        and x.data_ptr() % 16 == 0
        and sum(widths) == x.shape[3]
        and rows % heads == 0
        and heads & (heads - 1) == 0
        and max(rows // heads, heads, *widths) <= LONGEST_BOX
    )
