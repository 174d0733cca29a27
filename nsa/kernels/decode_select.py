"""Which blocks a decoding query keeps: eq. 8-11 from stored scores, many programs a query.

`rank_blocks_kernel` gives each selection block an int32 that orders as `best_blocks.ranking` says;
`best_blocks` finds the n highest, in every program that attends to some of them.
"""

# pyright: reportCallIssue=false

import triton.language as tl

from nsa.kernels.best_blocks import EMPTY, LAST, ranking
from nsa.kernels.jit import jit
from nsa.kernels.primitives import finite


@jit
def visible_blocks(t, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """How many compressed blocks have ended at position t."""
    return tl.maximum(t + 1 - SIZE + STRIDE, 0) // STRIDE


@jit
def softmax_of_splits(
    m_ptr, norm_ptr, first, heads, live, H: tl.constexpr, SPLITS: tl.constexpr, P: tl.constexpr
):
    """Of each head [ROWS] its lse in base 2, from the maximum and the norm of every split."""
    p = tl.arange(0, P)
    at = (first + p)[None, :] * H + heads[:, None]  # [ROWS, P]
    mask = live[:, None] & (p < SPLITS)[None, :]
    m = tl.load(m_ptr + at, mask=mask, other=float("-inf"))
    norm = tl.load(norm_ptr + at, mask=mask, other=0.0)
    top = finite(tl.max(m, 1))
    norm = tl.sum(norm * tl.exp2(m - top[:, None]), 1)
    return top + tl.log2(tl.where(norm > 0, norm, 1.0))


@jit
def spread_scores(
    scores_ptr, rows, live, lse2, c, seen, weight,
    BLOCKS: tl.constexpr, LANES: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """What compressed blocks c [BLOCKS * LANES] add to the selection blocks [BLOCKS], by weight."""
    mask = live[:, None] & seen[None, :]
    x = tl.load(scores_ptr + rows[:, None] + c[None, :], mask=mask, other=0.0)
    if not LOGITS:
        x = tl.exp2(x - lse2[:, None])
    total = tl.sum(tl.where(mask, x, 0.0), 0) * weight
    return tl.sum(tl.reshape(total, [BLOCKS, LANES]), 1)


@jit
def rank_blocks_kernel(
    scores_ptr, m_ptr, norm_ptr, positions_ptr, ranks_ptr, C, S, num_splits,
    H: tl.constexpr, J: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    LENGTH: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, LOGITS: tl.constexpr,
    SPLITS: tl.constexpr, P: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
    LANES: tl.constexpr,
):  # fmt: skip
    """BLOCKS selection blocks of one query and index head.

    Lane i of block s is compressed block s*RATIO + i. A block takes its share of the compressed
    blocks that begin in it, and of those that begin in the block before and reach into it.
    """
    R: tl.constexpr = H // J
    RATIO: tl.constexpr = LENGTH // STRIDE
    row, j, first = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2) * BLOCKS
    t = tl.load(positions_ptr + row).to(tl.int32)
    own = t // LENGTH
    s = first + tl.arange(0, BLOCKS)
    score = tl.zeros([BLOCKS], tl.float32)
    if first <= own:
        r = tl.arange(0, ROWS)
        live, heads = r < R, j * R + r
        lse2 = softmax_of_splits(m_ptr, norm_ptr, row * num_splits, heads, live, H, SPLITS, P)
        rows = (row * H + heads) * C
        x = tl.arange(0, BLOCKS * LANES)
        i = x % LANES
        c = (first + x // LANES) * RATIO + i
        visible = visible_blocks(t, SIZE, STRIDE)
        reach = (RATIO - i) * STRIDE  # from the compressed block's first token to the next block
        weight = tl.minimum(SIZE, reach).to(tl.float32) / STRIDE
        seen = (i < RATIO) & (c < visible)
        score = spread_scores(scores_ptr, rows, live, lse2, c, seen, weight, BLOCKS, LANES, LOGITS)
        spilled = tl.maximum(SIZE - reach, 0).to(tl.float32) / STRIDE
        before = c - RATIO
        spills = (i < RATIO) & (spilled > 0) & (before >= 0) & (before < visible)
        score += spread_scores(
            scores_ptr, rows, live, lse2, before, spills, spilled, BLOCKS, LANES, LOGITS
        )
        if LOGITS:
            total = tl.where(seen, weight, 0.0) + tl.where(spills, spilled, 0.0)
            total = tl.sum(tl.reshape(total, [BLOCKS, LANES]), 1)
            score = tl.where(total > 0, score / tl.where(total > 0, total, 1.0), -3.4028234e38)
    rank = ranking(score, s, own, 0, S, INITIAL, LOCAL, True, LOGITS)
    tl.store(ranks_ptr + (row * J + j) * S + s, rank, mask=s < S)


@jit
def best_blocks(ranks_ptr, S, N: tl.constexpr, PADDED_S: tl.constexpr, KEPT: tl.constexpr):
    """The N blocks of the highest rank, the lower one first on a tie; -1 where there are fewer."""
    s = tl.arange(0, PADDED_S)
    rank = tl.load(ranks_ptr + s, mask=s < S, other=EMPTY)
    key = (rank.to(tl.int64) << 32) | (-s + LAST).to(tl.int64)
    gone = tl.full([PADDED_S], EMPTY, tl.int64) << 32
    place = tl.arange(0, KEPT)
    blocks = tl.full([KEPT], -1, tl.int32)
    for k in range(N):
        best = tl.max(key, 0)
        block = tl.where((best >> 32) == EMPTY, -1, -(best & LAST).to(tl.int32) + LAST)
        blocks = tl.where(place == k, block, blocks)
        key = tl.where(key == best, gone, key)
    return blocks


@jit
def store_ascending(blocks, indices_ptr, N: tl.constexpr, KEPT: tl.constexpr):
    """A list of blocks as `select_blocks` gives it: ascending, -1 in empty slots at the end."""
    ordered = tl.sort(tl.where(blocks < 0, LAST, blocks))
    place = tl.arange(0, KEPT)
    tl.store(indices_ptr + place, tl.where(ordered == LAST, -1, ordered), mask=place < N)
