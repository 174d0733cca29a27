"""Tiles of rows by descriptor: Hopper's tensor memory accelerator (TMA) copies a tile at once.

One thread asks for a tile by its first row; no other computes or keeps an address.
A tile is a box of whole tokens, with one key head or all R query heads of it, of a width that is a
power of two. What does not suit is loaded by address, row by row (`load_rows`).
"""

from typing import Any

import torch
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from nsa.kernels.jit import jit
from nsa.kernels.primitives import load_rows, padded
from nsa.kernels.tile_sizes import capability

LONGEST_BOX = 256  # entries of a tile in any dimension


@jit
def load_tile(
    x, rows, live, b, t, T, head, D: tl.constexpr, PADDED_D: tl.constexpr, DESCRIBED: tl.constexpr
):
    """`load_rows` of a tile of x [B, T, H, D], which begins with token t and `head`.

    By descriptor, rows that are not live are what they are in x; those behind T are 0.
    """
    if DESCRIBED:
        if len(x.block_shape) == 3:
            tile = x.load([(b * T + t).to(tl.int32), head.to(tl.int32), 0])
        else:
            tile = x.load([b.to(tl.int32), t, head.to(tl.int32), 0])
        return tl.reshape(tile, [rows.shape[0], PADDED_D])
    else:
        return load_rows(x, rows, live, D, PADDED_D)


def has_tma(device: torch.device, dtype: torch.dtype) -> bool:
    """Copying by descriptor is for 16-bit tiles: no other has been timed."""
    return dtype.itemsize == 2 and capability(device) >= 90


def as_tiles(rows: int, heads: int, x: Tensor, y: Tensor) -> tuple[bool, Any, Any]:
    """Whether both arrays [B, T, H, D] are described, and both: as tiles, or as given.

    A tile has `rows` rows, `heads` to a token, and must begin with a whole one.
    """
    if not (suits(x, rows, heads) and suits(y, rows, heads)):
        return False, x, y
    return True, describe(x, rows, heads), describe(y, rows, heads)


def describe(x: Tensor, rows: int, heads: int) -> TensorDescriptor:
    """In three dimensions, which are faster, unless a tile might reach into the next sequence."""
    B, T, _, D = x.shape
    box = [rows // heads, heads, D]
    if B == 1 or T % box[0] == 0:
        return TensorDescriptor.from_tensor(x.flatten(0, 1), box)
    return TensorDescriptor.from_tensor(x, [1, *box])


def suits(x: Tensor, rows: int, heads: int) -> bool:
    D = x.shape[3]
    return (
        has_tma(x.device, x.dtype)
        and x.numel() > 0
        and all(each * x.element_size() % 16 == 0 for each in x.stride()[:-1])
        and x.data_ptr() % 16 == 0
        and padded(D) == D
        and rows % heads == 0
        and heads & (heads - 1) == 0
        and max(rows // heads, heads, D) <= LONGEST_BOX
    )
