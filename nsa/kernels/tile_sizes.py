"""Tiles by kernel: a table of what is known to be good, what is worth trying, and what fits."""

from functools import lru_cache
from typing import NamedTuple

import torch

from nsa.kernels.columns import key_slices
from nsa.kernels.primitives import padded

ANY = 2**31
SHARED_MEMORY = 163 * 1024  # bytes a program may use where no device says otherwise (sm_80)
HEADROOM = 0.9  # of it for operands; reductions and layout changes take the rest


class Tile(NamedTuple):
    """Sizes of one program: packed query rows, keys, warps and software-pipeline stages.

    Programs of the block order hold the keys of one block, so there keys says nothing. Rows of
    `select` are tokens, and keys its columns: compressed blocks, padding included.
    """

    rows: int
    keys: int
    warps: int
    stages: int


class Problem(NamedTuple):
    """What a tile is chosen by."""

    kernel: str  # an entry of TILES
    dtype: torch.dtype
    D: int
    DV: int
    R: int  # query heads that share a selection
    T: int
    device: torch.device
    mask: str = ""  # of the kernels of the tile order
    block: int = 0  # tokens of a block, in the block order

    @property
    def value_width(self) -> int:
        return padded(self.DV)

    @property
    def key_width(self) -> int:
        return sum(key_slices(self.D))

    @property
    def width(self) -> int:
        return max(self.key_width, self.value_width)


class Row(NamedTuple):
    """A tile, and up to where it is the one to take."""

    tile: Tile
    width: int = 256  # head dimension as tiles hold it, of keys or values
    value_width: int = 256  # of values alone
    R: int = ANY
    T: int = ANY
    block: int = ANY
    mask: str = ""  # this one alone, if it names one
    arch: int = 0  # compute capability from which on, as in sm_90

    def holds(self, problem: Problem) -> bool:
        return (
            problem.width <= self.width
            and problem.value_width <= self.value_width
            and problem.R <= self.R
            and problem.T <= self.T
            and problem.block <= self.block
            and self.mask in ("", problem.mask)
            and (not self.arch or self.arch <= capability(problem.device))
        )


# The first row that holds. 16-bit inputs; the fastest on an H100 at 8k and 64k tokens, paper sizes,
# as `python -m benchmarks.probes.tune` measured them (docs/kernel_log.md). Those of wide keys with
# values of at most 128 are not timed yet: of what compiles for sm_90 without spills in a loop,
# the tiles whose matrix products wait for one another the least, then the most rows and keys a warp
# group, then two programs a multiprocessor.
TILES = {
    "attend_fwd": (
        Row(Tile(64, 128, 4, 3), width=64, mask="bits"),
        Row(Tile(64, 64, 4, 3), width=64),
        Row(Tile(64, 64, 4, 3), width=128, mask="bits"),
        Row(Tile(64, 32, 4, 3), width=128, T=8192),
        Row(Tile(64, 64, 4, 3), width=128, mask="band"),
        Row(Tile(64, 64, 4, 3), width=128, R=1),
        Row(Tile(128, 64, 8, 3), width=128),
        Row(Tile(64, 64, 4, 2), value_width=128, mask="band"),
        Row(Tile(128, 64, 8, 3), width=192, value_width=128),
        Row(Tile(128, 64, 8, 2), value_width=128),
        Row(Tile(64, 64, 8, 2)),
    ),
    "attend_dq": (
        Row(Tile(64, 32, 4, 3), width=64, mask="band"),
        Row(Tile(64, 64, 4, 3), width=64),
        Row(Tile(64, 32, 4, 2), width=128, mask="band"),
        Row(Tile(64, 32, 4, 3), width=128, T=8192, mask="prefix"),
        Row(Tile(128, 64, 8, 3), width=128),
        Row(Tile(64, 32, 4, 2), value_width=128, mask="band"),
        Row(Tile(128, 64, 8, 3), width=192, value_width=128),
        Row(Tile(128, 32, 8, 3), value_width=128),
        Row(Tile(64, 32, 8, 2)),
    ),
    "attend_dkv": (
        Row(Tile(64, 64, 4, 3), width=64, arch=90),
        Row(Tile(32, 64, 4, 2), width=64),
        Row(Tile(64, 64, 4, 2), width=128, mask="bits"),
        Row(Tile(32, 64, 4, 3), width=128, R=1, T=8192),
        Row(Tile(64, 64, 4, 2), width=128),
        Row(Tile(64, 64, 8, 1), width=192, value_width=128, mask="band"),
        Row(Tile(32, 64, 4, 1), width=192, value_width=128),
        Row(Tile(64, 64, 8, 1), value_width=128),
        Row(Tile(32, 64, 8, 2)),
    ),
    "block_fwd": (
        Row(Tile(64, 0, 4, 2), width=64, block=32),
        Row(Tile(128, 0, 8, 3), width=64),
        Row(Tile(64, 0, 4, 3), width=128, block=64),
        Row(Tile(64, 0, 8, 2), width=128),
        Row(Tile(32, 0, 4, 2), block=32),
        Row(Tile(64, 0, 4, 3), value_width=128, block=64),
        Row(Tile(32, 0, 8, 2)),
    ),
    "merge": (
        Row(Tile(64, 0, 4, 1), width=128),
        Row(Tile(32, 0, 4, 1)),
    ),
    "block_bwd": (
        Row(Tile(64, 0, 4, 3), width=64, block=64),
        Row(Tile(64, 0, 4, 2), width=64),
        Row(Tile(64, 0, 4, 3), width=128, R=8, block=64),
        Row(Tile(64, 0, 4, 2), width=128, block=64),
        Row(Tile(64, 0, 8, 2), width=128),
        Row(Tile(32, 0, 4, 2), block=32),
        Row(Tile(64, 0, 8, 2), value_width=128, block=64),
        Row(Tile(32, 0, 8, 2)),
    ),
    "select": (
        Row(Tile(128, 64, 4, 2), width=128, R=1),
        Row(Tile(64, 128, 4, 2), width=128),
        Row(Tile(64, 64, 4, 2)),
    ),
}
# Twice the bytes, and float32 products that run on the plain cores where they must be exact.
TILES_FLOAT32 = {
    "attend_fwd": (
        Row(Tile(64, 32, 4, 2), width=64),
        Row(Tile(32, 32, 4, 2), width=128),
        Row(Tile(32, 16, 4, 1)),
    ),
    "attend_dq": (
        Row(Tile(64, 32, 4, 2), width=64),
        Row(Tile(32, 32, 4, 1), width=128),
        Row(Tile(16, 16, 4, 1)),
    ),
    "attend_dkv": (
        Row(Tile(32, 64, 4, 1), width=64),
        Row(Tile(32, 32, 4, 1), width=128),
        Row(Tile(16, 16, 4, 1)),
    ),
    "block_fwd": (Row(Tile(32, 0, 4, 1), width=128), Row(Tile(16, 0, 4, 1))),
    "merge": (Row(Tile(32, 0, 4, 1), width=128), Row(Tile(16, 0, 4, 1))),
    "block_bwd": (Row(Tile(32, 0, 4, 1), width=128), Row(Tile(16, 0, 4, 1))),
    "select": (Row(Tile(32, 64, 4, 2)),),
}


def tiles(rows: tuple[int, ...], keys: tuple[int, ...], *programs: tuple[int, int]) -> list[Tile]:
    """Every tile of these rows and keys, with each pair of warps and stages."""
    return [Tile(r, k, w, s) for r in rows for k in keys for w, s in programs]


# What is worth timing, for 16-bit inputs: what compiles without heavy spills (docs/kernel_log.md).
CANDIDATES = {
    "attend_fwd": [
        *tiles((64,), (32, 64, 128), (4, 2), (4, 3)),
        *tiles((128,), (32, 64, 128), (8, 2), (8, 3)),
    ],
    "attend_dq": [
        *tiles((64,), (32, 64), (4, 2), (4, 3)),
        *tiles((128,), (32, 64), (8, 2), (8, 3)),
    ],
    "attend_dkv": [
        *tiles((32, 64), (64,), (4, 1), (4, 2), (4, 3), (8, 1), (8, 2)),
        *tiles((32, 64), (128,), (8, 1), (8, 2)),
        *tiles((128,), (64,), (8, 1)),
    ],
    "block_fwd": [
        *tiles((32, 64), (0,), (4, 2), (4, 3), (4, 4)),
        *tiles((64, 128), (0,), (8, 2), (8, 3)),
    ],
    "merge": [*tiles((32, 64), (0,), (4, 1), (4, 2)), *tiles((64, 128), (0,), (8, 1), (8, 2))],
    "block_bwd": tiles((32, 64), (0,), (4, 1), (4, 2), (4, 3), (8, 2), (8, 3)),
    "select": [
        *tiles((64, 128), (64,), (4, 2)),
        *tiles((64,), (128,), (4, 2)),
        *tiles((128,), (64, 128), (8, 2)),
        *tiles((256,), (64,), (8, 2)),
    ],
}


@lru_cache
def table_tile(problem: Problem) -> Tile:
    """The table's tile, shrunk until its operands fit the shared memory of a smaller GPU."""
    if problem.width > 256:
        wide = max(problem.D, problem.DV)
        raise ValueError(f"head dimension {wide} is above 256: use backend='torch'")
    table = TILES_FLOAT32 if problem.dtype.itemsize == 4 else TILES
    tile = next(row.tile for row in table[problem.kernel] if row.holds(problem))
    while not fits(problem, tile):
        tile = shrunk(tile)
    return tile


def candidates(problem: Problem) -> list[Tile]:
    """The tiles worth timing, the table's first."""
    first = table_tile(problem)
    others = CANDIDATES[problem.kernel] if problem.dtype.itemsize < 4 else []
    return [first, *(tile for tile in others if tile != first and fits(problem, tile))]


def fits(problem: Problem, tile: Tile) -> bool:
    return operand_bytes(problem, tile) <= HEADROOM * shared_memory(problem.device)


def operand_bytes(problem: Problem, tile: Tile) -> int:
    """Shared memory of a kernel's operands: what stays, and what streams through the stages."""
    D, DV, rows = problem.key_width, problem.value_width, tile.rows
    keys = padded(problem.block) if problem.block else tile.keys
    stays, streams = {
        "attend_fwd": (rows * D, keys * (D + DV)),
        "attend_dq": (rows * (D + DV), keys * (D + DV)),
        "attend_dkv": (keys * (D + DV) + rows * keys, rows * (D + DV)),
        "block_fwd": (keys * (D + DV), rows * D),
        "merge": (rows * D, keys * (D + DV)),
        "block_bwd": (keys * (D + DV) + rows * keys, rows * (D + DV)),
        "select": (keys * D, rows * D),
    }[problem.kernel]
    return (stays + tile.stages * streams) * problem.dtype.itemsize


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


def capability(device: torch.device) -> int:
    """90 of an sm_90; 0 where there is no GPU."""
    if device.type != "cuda":
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
