"""Importance of selection blocks (eq. 8-10) and the n best of them (eq. 11), in one kernel.

A selection block s of l' tokens covers RATIO = l'/d compressed blocks that begin in it, and takes a
share of those that begin in the block before and reach into it (l <= l', so none begins earlier).
A tile therefore holds BLOCKS selection blocks as LANES x BLOCKS columns: column (i, s) with
i < RATIO is compressed block s * RATIO + i; LANES pads RATIO to a power of two. Eq. 9 becomes two
weighted sums over i, own and spilled, the second handed on to the next block.

Nothing of size T x C or T x S is stored: the best blocks so far stay in registers. What ranks them
has tokens in its last axis, so that one thread holds all the blocks of a token and sorts them
without a word to the others; where a program has twice as many threads as tokens, a token has two
sets, each of half the blocks of every tile, joined at the end.
"""

import torch
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nsa.blocks import Starts
from nsa.config import NSAConfig
from nsa.kernels.autotune import with_tile
from nsa.kernels.best_blocks import EMPTY, LAST, keep_best, one_set, ranking
from nsa.kernels.columns import inner_products, key_slice, load_columns
from nsa.kernels.jit import jit
from nsa.kernels.primitives import (
    LOG2E,
    cdiv,
    load_lse2,
    operands,
    power_of_2,
    precision,
    whole,
)
from nsa.kernels.registration import custom_op, register_fake
from nsa.kernels.tile_order.visible import document_start
from nsa.kernels.tile_sizes import Problem, Tile


@jit
def score_tile(
    q_ptr, k_ptr, lse_ptr, rows, live, t, start, b, g, s0, T, C, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr, LANES: tl.constexpr,
    CAUSAL: tl.constexpr, LOGITS: tl.constexpr, DOCUMENTS: tl.constexpr,
    TOKENS: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Sum over the heads of probabilities, or of scaled scores; 0 where unseen.  Also: seen."""
    R: tl.constexpr = H // J
    lane = tl.arange(0, BLOCKS * LANES) // BLOCKS
    offs_c = (s0 + tl.arange(0, BLOCKS * LANES) % BLOCKS) * RATIO + lane
    exists = (lane < RATIO) & (offs_c < C)
    k = load_columns(k_ptr, (b * C + offs_c) * G + g, exists, D, WIDTH)  # of [LANES*BLOCKS, D]
    score = tl.zeros([TOKENS, BLOCKS * LANES], tl.float32)
    for i in range(R):
        # There and back: a tile begins with the queries that L2 saw last.
        r = tl.where(s0 // BLOCKS % 2 == 0, i, R - 1 - i)
        q = load_columns(q_ptr, rows + r, live, D, WIDTH)  # slices of [TOKENS, D]
        s = inner_products(q, k, PRECISION)
        if LOGITS:
            score += s * (scale / R)
        else:
            lse2 = load_lse2(lse_ptr, rows + r, live)
            score += tl.exp2(s * (scale * LOG2E) - lse2[:, None])
    if CAUSAL:  # what has ended exists
        begin = (tl.arange(0, BLOCKS * LANES) % BLOCKS * RATIO + lane) * STRIDE
        end, token0 = begin + SIZE - 1, s0 * (RATIO * STRIDE)
        seen = (lane < RATIO)[None, :] & (end[None, :] <= (t - token0)[:, None])
        if DOCUMENTS:
            seen = seen & (begin[None, :] >= (start - token0)[:, None])
    else:
        seen = tl.broadcast_to(exists[None, :], [TOKENS, BLOCKS * LANES])
    return tl.where(seen, score, 0.0), seen


@jit
def follow(stays, leaves, arrives, known, next_stays, next_leaves, next_arrives, next_known):
    """Of two runs of blocks: the last one, and what left the block before it. Associative."""
    return next_stays, next_leaves, tl.where(next_known != 0, next_arrives, leaves), next_known | 1


@jit
def by_set(x, TOKENS: tl.constexpr, BLOCKS: tl.constexpr, SETS: tl.constexpr):
    """[ROWS, TOKENS*SETS] from [TOKENS, BLOCKS]: a token's blocks in runs of ROWS, one a set."""
    x = tl.reshape(x, [TOKENS, SETS, BLOCKS // SETS])
    return tl.reshape(tl.permute(x, (2, 0, 1)), [BLOCKS // SETS, TOKENS * SETS])


@jit
def spread(
    x, carry, SIZE: tl.constexpr, STRIDE: tl.constexpr, RATIO: tl.constexpr,
    TOKENS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr, SETS: tl.constexpr,
):  # fmt: skip
    """Eq. 9 on a tile, `by_set`: importance, and what leaves each block for the next.

    carry is what left the blocks of the tile before.
    """
    ROWS: tl.constexpr = BLOCKS // SETS
    i = tl.arange(0, LANES)
    own = tl.minimum(SIZE, (RATIO - i) * STRIDE).to(tl.float32) / STRIDE
    spilled = tl.maximum(SIZE - (RATIO - i) * STRIDE, 0).to(tl.float32) / STRIDE
    own = tl.where(i < RATIO, own, 0.0)
    spilled = tl.where(i < RATIO, spilled, 0.0)
    x = tl.reshape(x, [TOKENS, LANES, BLOCKS])
    stays = by_set(tl.sum(x * own[None, :, None], 1), TOKENS, BLOCKS, SETS)
    leaves = by_set(tl.sum(x * spilled[None, :, None], 1), TOKENS, BLOCKS, SETS)
    none = tl.zeros_like(leaves)
    # A scan, since Triton lays out its result anew: from here on a thread holds whole columns.
    run = (stays, leaves, none, none.to(tl.int32))
    stays, leaves, arrives, _ = tl.associative_scan(run, 0, follow)
    into_first = carry  # its last row: what arrives in the first row of the next set
    if SETS == 2:
        second = (tl.arange(0, TOKENS * 2) % 2 == 1)[None, :]
        into_first = tl.reshape(tl.where(second, carry, leaves), [ROWS, TOKENS, 2])
        into_first = tl.reshape(tl.flip(into_first, 2), [ROWS, TOKENS * 2])
    row = tl.arange(0, ROWS)[:, None]
    into_first = tl.sum(tl.where(row == ROWS - 1, into_first, 0.0), 0)[None, :]
    return stays + tl.where(row == 0, into_first, arrives), leaves


@jit
def select_kernel(
    q_ptr, k_ptr, lse_ptr, starts_ptr, indices_ptr, T, C, num_blocks, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr, CAUSAL: tl.constexpr, LOGITS: tl.constexpr,
    WIDTH: tl.constexpr, TOKENS: tl.constexpr, BLOCKS: tl.constexpr, LANES: tl.constexpr,
    SETS: tl.constexpr, LOG_ROWS: tl.constexpr, LOG_KEPT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens of one index head: score a tile of blocks over all its heads, keep the best."""
    RATIO: tl.constexpr = LENGTH // STRIDE
    ROWS: tl.constexpr = 2**LOG_ROWS  # BLOCKS // SETS
    KEPT: tl.constexpr = 2**LOG_KEPT
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

    DOCUMENTS: tl.constexpr = starts_ptr is not None
    start = document_start(starts_ptr, b, t, T)
    first_seen = document_start(starts_ptr, b, tile * TOKENS, T) // LENGTH

    column = tl.arange(0, TOKENS * SETS)  # token, set
    own = ((tile * TOKENS + column // SETS) // LENGTH)[None, :]
    begin = document_start(starts_ptr, b, tile * TOKENS + column // SETS, T) // LENGTH
    best = tl.full([KEPT, TOKENS * SETS], EMPTY, tl.int32)
    best_tie = tl.full([KEPT, TOKENS * SETS], 0, tl.uint32)
    carry = tl.zeros([ROWS, TOKENS * SETS], tl.float32)
    carry_seen = tl.zeros([ROWS, TOKENS * SETS], tl.float32)
    for s0 in range(first_seen, last, BLOCKS):
        x, seen = score_tile(
            q_ptr, k_ptr, lse_ptr, rows, live, t, start, b, g, s0, T, C, scale,
            H, G, J, D, WIDTH, SIZE, STRIDE, RATIO, LANES, CAUSAL, LOGITS, DOCUMENTS,
            TOKENS, BLOCKS, PRECISION,
        )  # fmt: skip
        score, carry = spread(x, carry, SIZE, STRIDE, RATIO, TOKENS, BLOCKS, LANES, SETS)
        if LOGITS:
            weight, carry_seen = spread(
                seen.to(tl.float32), carry_seen, SIZE, STRIDE, RATIO, TOKENS, BLOCKS, LANES, SETS
            )
            score = tl.where(weight > 0, score / tl.where(weight > 0, weight, 1.0), -3.4028234e38)
        first = s0 + (column % SETS * ROWS)[None, :]
        row = tl.arange(0, ROWS)[:, None]
        first_row = begin[None, :] - first  # of the token's document
        rank = ranking(
            score, row, own - first, first_row, num_blocks - first, INITIAL, LOCAL, CAUSAL, LOGITS
        )
        if DOCUMENTS:
            rank = tl.where(row >= first_row, rank, EMPTY)
        tie = (-first + LAST - row).to(tl.uint32)
        best, best_tie = keep_best(best, best_tie, rank, tie, LOG_ROWS, LOG_KEPT)

    if SETS == 2:
        best, best_tie = one_set(best, best_tie, LOG_KEPT)
    place = tl.arange(0, KEPT)[None, :]
    block = -tl.trans(best_tie).to(tl.int32) + LAST
    block = tl.where((tl.trans(best) != EMPTY) & (place < N), block, LAST)
    block = tl.sort(block, dim=1)
    out = indices_ptr + ((b * T + t)[:, None] * J + j) * N + place
    tl.store(out, tl.where(block == LAST, -1, block), mask=live[:, None] & (place < N))


@custom_op
def select_blocks_op(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    starts: Tensor | None,
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
        blocks = columns // lanes
        sets = 2 if 32 * tile.warps > tokens and blocks > 1 else 1
        select_kernel[(cdiv(T, tokens) * B * J,)](
            q, k_cmp, lse, starts, indices, T, k_cmp.shape[1], cdiv(T, length), D**-0.5,
            H=H, G=k_cmp.shape[2], J=J, D=D, N=n, SIZE=size, STRIDE=stride,
            LENGTH=length, INITIAL=initial, LOCAL=local, CAUSAL=causal, LOGITS=logits,
            WIDTH=key_slice(D), TOKENS=tokens, BLOCKS=blocks, LANES=lanes, SETS=sets,
            LOG_ROWS=(blocks // sets).bit_length() - 1, LOG_KEPT=kept.bit_length() - 1,
            PRECISION=precision(), num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        return indices

    if n == 0:
        return torch.empty(B, T, J, 0, dtype=torch.int32, device=q.device)
    with torch.cuda.device_of(q):
        return with_tile(Problem("select", q.dtype, D, D, H // J, T, q.device), launch)


@register_fake(select_blocks_op)
def _(q, k_cmp, lse, starts, index_heads, n, *sizes):
    return q.new_empty(q.shape[0], q.shape[1], index_heads, n, dtype=torch.int32)


def select_blocks(
    q: Float[Tensor, "B T H D"],
    k_cmp: Float[Tensor, "B C G D"],
    lse: Float[Tensor, "B T H"],
    cfg: NSAConfig,
    shared: bool = True,
    *,
    document_starts: Starts = None,
) -> Int[Tensor, "B T J N"]:
    """The n blocks each query keeps, int32: ascending, distinct, -1 in empty slots.

    Forced blocks first, then by importance, and the lower block of two whose computed importances
    are equal; rounding may tell apart what is equal on paper. Not differentiable.
    """
    q, k_cmp = operands(q.detach(), k_cmp.detach())
    return select_blocks_op(
        q, k_cmp, lse.detach().float().contiguous(), whole(document_starts),
        k_cmp.shape[2] if shared else q.shape[2],
        cfg.num_selected_blocks, cfg.compress_block_size, cfg.compress_block_sliding_stride,
        cfg.selection_block_size, cfg.num_initial_blocks, cfg.num_local_blocks, cfg.causal,
        cfg.importance == "logit_mean",
    )  # fmt: skip
