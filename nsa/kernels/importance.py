"""Importance of selection blocks (eq. 8-10) and the n best of them (eq. 11), in one kernel.

A selection block s of l' tokens covers RATIO = l'/d compressed blocks that begin in it, and takes a
share of those that begin in the block before and reach into it (l <= l', so none begins earlier).
A tile therefore holds BLOCKS selection blocks as BLOCKS x LANES columns: column (s, i) with
i < RATIO is compressed block s * RATIO + i; LANES pads RATIO to a power of two. Eq. 9 becomes two
weighted sums over i, own and spilled, the second handed on to the next block.

Nothing of size T x C or T x S is stored: the best blocks so far stay in registers as sorted int64
keys, score bits above, inverted block index below, so a higher key is a better block and the lower
block wins a tie.
"""

# pyright: reportCallIssue=false

from typing import no_type_check

import torch
import triton
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.autotune import with_tile
from nsa.kernels.op import custom_op, register_fake
from nsa.kernels.primitives import (
    LOG2E,
    cdiv,
    load_lse2,
    load_rows,
    operands,
    padded,
    power_of_2,
    precision,
)
from nsa.kernels.tile_sizes import Problem, Tile

EMPTY = tl.constexpr(-(2**63))  # the key of a block that may not be kept
LAST = tl.constexpr(2**31 - 1)  # above any block index


@triton.jit
@no_type_check
def score_tile(
    q_ptr, k_ptr, lse_ptr, rows, live, t, b, g, s0, T, C, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr, LANES: tl.constexpr,
    CAUSAL: tl.constexpr, LOGITS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum over the heads of probabilities, or of scaled scores; 0 where unseen.  Also: seen."""
    R: tl.constexpr = H // J
    lane = tl.arange(0, BLOCKS * LANES) % LANES
    offs_c = (s0 + tl.arange(0, BLOCKS * LANES) // LANES) * RATIO + lane
    exists = (lane < RATIO) & (offs_c < C)
    k = load_rows(k_ptr, (b * C + offs_c) * G + g, exists, D, BLOCK_D)  # [BLOCKS*LANES, BLOCK_D]
    score = tl.zeros([TOKENS, BLOCKS * LANES], tl.float32)
    for r in range(R):
        q = load_rows(q_ptr, rows + r, live, D, BLOCK_D)  # [TOKENS, BLOCK_D]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if LOGITS:
            score += s * (scale / R)
        else:
            lse2 = load_lse2(lse_ptr, rows + r, live)
            score += tl.exp2(s * (scale * LOG2E) - lse2[:, None])
    seen = tl.broadcast_to(exists[None, :], [TOKENS, BLOCKS * LANES])
    if CAUSAL:
        seen = seen & ((offs_c * STRIDE + SIZE - 1)[None, :] <= t[:, None])
    return tl.where(seen, score, 0.0), seen


@triton.jit
@no_type_check
def spread(
    x, carry, SIZE: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr,
    TOKENS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Eq. 9 on a tile: [TOKENS, BLOCKS], and what spills into the block after the tile [TOKENS]."""
    i = tl.arange(0, LANES)
    own = tl.minimum(SIZE, (RATIO - i) * STRIDE).to(tl.float32) / STRIDE
    spilled = tl.maximum(SIZE - (RATIO - i) * STRIDE, 0).to(tl.float32) / STRIDE
    own = tl.where(i < RATIO, own, 0.0)
    spilled = tl.where(i < RATIO, spilled, 0.0)
    x = tl.reshape(x, [TOKENS, BLOCKS, LANES])
    stays = tl.sum(x * own[None, None, :], 2)
    leaves = tl.sum(x * spilled[None, None, :], 2)
    s = tl.arange(0, BLOCKS)[None, :]
    before = tl.broadcast_to(tl.maximum(s - 1, 0), [TOKENS, BLOCKS])
    arrives = tl.where(s == 0, carry[:, None], tl.gather(leaves, before, 1))
    return stays + arrives, tl.sum(tl.where(s == BLOCKS - 1, leaves, 0.0), 1)


@triton.jit
@no_type_check
def ranking_key(score, block, t, num_blocks,
    LENGTH: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Order-preserving int64: forced blocks first (own, initial, local), then the higher score."""
    bits = (score + 0.0).to(tl.int32, bitcast=True)
    bits = bits ^ ((bits >> 31) & LAST)  # floats as integers of the same order
    own = t // LENGTH
    bits = tl.where((block < own) & (block > own - LOCAL), LAST - 2, bits)
    bits = tl.where(block < INITIAL, LAST - 1, bits)
    bits = tl.where(block == own, LAST, bits)
    key = (bits.to(tl.int64) << 32) | (-block + LAST).to(tl.int64)
    may = block < num_blocks
    if CAUSAL:
        may = may & (block <= own)
    return tl.where(may, key, EMPTY)


@triton.jit
@no_type_check
def keep_best(best, key, TOKENS: tl.constexpr, BLOCKS: tl.constexpr, KEPT: tl.constexpr):
    """The KEPT highest of two sets of keys, descending: a bitonic merge."""
    if BLOCKS > KEPT:
        key = tl.topk(key, KEPT, dim=1)
    else:
        if BLOCKS < KEPT:  # widen: copies of the tile, all but the first emptied
            copies: tl.constexpr = KEPT // BLOCKS
            key = tl.broadcast_to(key[:, None, :], [TOKENS, copies, BLOCKS])
            key = tl.where((tl.arange(0, copies) == 0)[None, :, None], key, EMPTY)
            key = tl.reshape(key, [TOKENS, KEPT])
        key = tl.sort(key, dim=1, descending=True)
    return tl.sort(tl.maximum(best, tl.flip(key, 1)), dim=1, descending=True)


@triton.jit
@no_type_check
def select_kernel(
    q_ptr, k_ptr, lse_ptr, indices_ptr, T, C, num_blocks, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr, CAUSAL: tl.constexpr, LOGITS: tl.constexpr,
    BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
    KEPT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one index head: score a tile of blocks over all its heads, keep the best."""
    RATIO: tl.constexpr = LENGTH // STRIDE
    num_tiles = tl.cdiv(T, TOKENS)
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles  # the longest first
    bj = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, j = bj // J, bj % J
    g = j // (J // G)
    t = tile * TOKENS + tl.arange(0, TOKENS)
    live = t < T
    rows = (b * T + t) * H + j * (H // J)
    last = num_blocks
    if CAUSAL:
        last = tl.minimum(num_blocks, (tile * TOKENS + TOKENS - 1) // LENGTH + 1)

    best = tl.full([TOKENS, KEPT], EMPTY, tl.int64)
    carry = tl.zeros([TOKENS], tl.float32)
    carry_seen = tl.zeros([TOKENS], tl.float32)
    for s0 in range(0, last, BLOCKS):
        x, seen = score_tile(
            q_ptr, k_ptr, lse_ptr, rows, live, t, b, g, s0, T, C, scale,
            H, G, J, D, BLOCK_D, SIZE, STRIDE, RATIO, LANES, CAUSAL, LOGITS,
            TOKENS, BLOCKS, PRECISION,
        )  # fmt: skip
        score, carry = spread(x, carry, SIZE, STRIDE, RATIO, TOKENS, BLOCKS, LANES)
        if LOGITS:
            weight, carry_seen = spread(
                seen.to(tl.float32), carry_seen, SIZE, STRIDE, RATIO, TOKENS, BLOCKS, LANES
            )
            score = tl.where(weight > 0, score / tl.where(weight > 0, weight, 1.0), -3.4028234e38)
        block = s0 + tl.arange(0, BLOCKS)
        key = ranking_key(
            score, block[None, :], t[:, None], num_blocks, LENGTH, INITIAL, LOCAL, CAUSAL
        )
        best = keep_best(best, key, TOKENS, BLOCKS, KEPT)

    rank = tl.arange(0, KEPT)[None, :]
    block = -(best & LAST).to(tl.int32) + LAST
    block = tl.where((best != EMPTY) & (rank < N), block, LAST)
    block = tl.sort(block, dim=1)
    out = indices_ptr + ((b * T + t)[:, None] * J + j) * N + rank
    tl.store(out, tl.where(block == LAST, -1, block), mask=live[:, None] & (rank < N))


@custom_op
def select(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    index_heads: int,
    n: int,
    size: int,
    stride: int,
    length: int,
    initial: int,
    local: int,
    causal: bool,
    logits: bool,
) -> Tensor:
    B, T, H, D = q.shape
    J, lanes, kept = index_heads, power_of_2(length // stride), power_of_2(n)

    def launch(tile: Tile) -> Tensor:
        indices = torch.empty(B, T, J, n, dtype=torch.int32, device=q.device)
        tokens, columns = tile.rows, max(16, lanes, tile.keys)
        while tokens > 16 and tokens * max(columns, 2 * kept) > 128 * 128:  # many are kept: sorted
            tokens //= 2
        select_kernel[(cdiv(T, tokens) * B * J,)](
            q, k_cmp, lse, indices, T, k_cmp.shape[1], cdiv(T, length), D**-0.5,
            H=H, G=k_cmp.shape[2], J=J, D=D, N=n, SIZE=size, STRIDE=stride,
            LENGTH=length, INITIAL=initial, LOCAL=local, CAUSAL=causal, LOGITS=logits,
            BLOCK_D=padded(D), TOKENS=tokens, BLOCKS=columns // lanes, LANES=lanes, KEPT=kept,
            PRECISION=precision(), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return indices

    if n == 0:
        return torch.empty(B, T, J, 0, dtype=torch.int32, device=q.device)
    with torch.cuda.device_of(q):
        return with_tile(Problem("select", q.dtype, D, D, H // J, T, q.device), launch)


@register_fake(select)
def _(q, k_cmp, lse, index_heads, n, *rules):
    return q.new_empty(q.shape[0], q.shape[1], index_heads, n, dtype=torch.int32)


def select_blocks(
    q: Float[Tensor, "B T H D"],
    k_cmp: Float[Tensor, "B C G D"],
    lse: Float[Tensor, "B T H"],
    cfg: NSAConfig,
    shared: bool = True,
) -> Int[Tensor, "B T X N"]:
    """The n blocks each query keeps, int32: ascending, distinct, -1 in empty slots.

    Forced blocks first, then by importance; on a tie the lower block. Not differentiable.
    """
    q, k_cmp = operands(q.detach(), k_cmp.detach())
    return select(
        q, k_cmp, lse.detach().float().contiguous(), k_cmp.shape[2] if shared else q.shape[2],
        cfg.num_selected_blocks, cfg.compress_block_size, cfg.compress_block_sliding_stride,
        cfg.selection_block_size, cfg.num_initial_blocks, cfg.num_local_blocks, cfg.causal,
        cfg.importance == "logit_mean",
    )  # fmt: skip
