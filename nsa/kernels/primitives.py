"""What every kernel shares: loading rows, a row's delta, tile sizes.

Kernels see contiguous [B, T, H, D] arrays. The R query heads of a key head are packed into the
rows of a tile: row i of index head j is token i // R, query head j * R + i % R. Softmax runs in
base 2 inside kernels; every lse that leaves one is a natural log. `no_type_check` keeps a run-time
type checker from wrapping functions that are compiled from their source.
"""

# pyright: reportCallIssue=false

from functools import lru_cache
from typing import NamedTuple, no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
@no_type_check
def load_rows(ptr, rows, live, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Rows of a [*, D] array, 0 where not live and beyond D.  [rows, BLOCK_D]"""
    offs_d = tl.arange(0, BLOCK_D)
    mask = live[:, None]
    if D != BLOCK_D:
        mask = mask & (offs_d < D)[None, :]
    return tl.load(ptr + rows[:, None] * D + offs_d[None, :], mask=mask, other=0.0)


@triton.jit
@no_type_check
def store_rows(ptr, rows, live, x, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """The counterpart of load_rows; casts to the array's dtype."""
    offs_d = tl.arange(0, BLOCK_D)
    mask = live[:, None]
    if D != BLOCK_D:
        mask = mask & (offs_d < D)[None, :]
    tl.store(ptr + rows[:, None] * D + offs_d[None, :], x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
@no_type_check
def load_lse2(ptr, rows, live):
    """A row's lse in base 2, +inf where the row saw nothing: its probabilities come out as 0."""
    lse = tl.load(ptr + rows, mask=live, other=float("inf"))
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E)


@triton.jit
@no_type_check
def finite(m):
    """A maximum to subtract: 0 where nothing was seen, so that exp2(-inf - m) is 0, not NaN."""
    return tl.where(m == float("-inf"), 0.0, m)


@triton.jit
@no_type_check
def row_delta(out_ptr, dout, dlse_ptr, rows, live, DV: tl.constexpr, BLOCK_DV: tl.constexpr):
    """What is taken from every dP of a row, sum(dO * O) - dlse.

    A row that saw nothing has out 0; its dlse counts for nothing later.
    """
    out = load_rows(out_ptr, rows, live, DV, BLOCK_DV).to(tl.float32)
    delta = tl.sum(out * dout.to(tl.float32), 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + rows, mask=live, other=0.0)
    return delta


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << max(n - 1, 0).bit_length()


def padded(width: int) -> int:
    """A head dimension as a tile holds it: a power of two, at least what tl.dot takes."""
    return max(16, power_of_2(width))


def precision() -> str:
    """How tl.dot multiplies float32: PyTorch's own switch decides (16-bit inputs ignore it)."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


class Tile(NamedTuple):
    """Sizes of one program: packed query rows, keys, warps and software-pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


# 16-bit inputs, by kernel and padded head dimension (at most that wide). Chosen from registers and
# shared memory as compiled for sm_90; README.md has the figures.
TILES = {
    "forward": {64: Tile(128, 64, 4, 3), 128: Tile(128, 64, 8, 3), 256: Tile(64, 64, 8, 2)},
    "dq": {64: Tile(128, 64, 8, 2), 128: Tile(128, 64, 8, 2), 256: Tile(64, 32, 8, 2)},
    "dkv": {64: Tile(64, 64, 4, 2), 128: Tile(64, 64, 4, 2), 256: Tile(32, 64, 8, 2)},
}
# Twice the bytes, and float32 products that run on the plain cores where they must be exact.
TILES_FLOAT32 = {
    "forward": {64: Tile(64, 32, 4, 2), 128: Tile(32, 32, 4, 2), 256: Tile(32, 16, 4, 1)},
    "dq": {64: Tile(64, 32, 4, 2), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
    "dkv": {64: Tile(32, 64, 4, 1), 128: Tile(32, 32, 4, 1), 256: Tile(16, 16, 4, 1)},
}
SHARED_MEMORY = 163 * 1024  # bytes a program may use where no device says otherwise (sm_80)
HEADROOM = 0.9  # of it for operands; reductions and layout changes take the rest


@lru_cache
def tile_for(kernel: str, dtype: torch.dtype, D: int, DV: int, device: torch.device) -> Tile:
    """The table's tile, shrunk until its operands fit the shared memory of a smaller GPU."""
    width = max(padded(D), padded(DV))
    if width > 256:
        raise ValueError(f"head dimension {max(D, DV)} is above 256: use backend='reference'")
    table = (TILES_FLOAT32 if dtype.itemsize == 4 else TILES)[kernel]
    tile = next(tile for most, tile in table.items() if width <= most)
    limit = shared_memory(device)
    while operand_bytes(kernel, tile, padded(D), padded(DV), dtype.itemsize) > HEADROOM * limit:
        tile = shrunk(tile)
    return tile


def operand_bytes(kernel: str, tile: Tile, D: int, DV: int, itemsize: int) -> int:
    """Shared memory of a kernel's operands: what stays, and what streams through the stages."""
    rows, keys, _, stages = tile
    stays, streams = {
        "forward": (rows * D, keys * (D + DV)),
        "dq": (rows * (D + DV), keys * (D + DV)),
        "dkv": (keys * (D + DV) + rows * keys, rows * (D + DV)),
    }[kernel]
    return (stays + stages * streams) * itemsize


def shrunk(tile: Tile) -> Tile:
    """The next smaller tile: fewer stages first, then fewer keys, then fewer rows."""
    rows, keys, warps, stages = tile
    if stages > 1:
        return Tile(rows, keys, warps, stages - 1)
    if keys > 16:
        return Tile(rows, keys // 2, warps, stages)
    if rows > 16:
        return Tile(rows // 2, keys, warps, stages)
    raise ValueError("this GPU has too little shared memory for heads this wide")


def shared_memory(device: torch.device) -> int:
    if device.type != "cuda":
        return SHARED_MEMORY
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """How many programs run side by side, at least; the interpreter runs one."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def operands(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors as kernels multiply them: contiguous, of one dtype, under autocast of its own."""
    device = tensors[0].device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return tuple(x.to(dtype).contiguous() for x in tensors)
    dtypes = {x.dtype for x in tensors}
    if len(dtypes) > 1 or not dtypes <= {torch.float32, torch.bfloat16, torch.float16}:
        raise ValueError(
            f"dtypes {sorted(map(str, dtypes))}: kernels multiply tensors of one dtype, float32, "
            "bfloat16 or float16; cast them, run under autocast, or use backend='reference'"
        )
    return tuple(x.contiguous() for x in tensors)
