"""The best blocks of a token, kept while tiles of blocks stream by (eq. 11): which one goes first.

A block is a pair: its rank, an int32 made of its score, and a tie, a uint32 that falls as its index
grows. The pair is one key of 64 bits to compare, but two numbers to exchange: of keys in one piece
the compiler makes a maximum and a minimum, and each compares anew. Arrays are [blocks, W] for W
sets, and the networks run along axis 0: a thread that holds whole columns exchanges registers.
"""

# pyright: reportGeneralTypeIssues=false

import triton.language as tl

from nsa.kernels.jit import jit

EMPTY = tl.constexpr(-(2**31))  # the rank of a block that may not be kept
LAST = tl.constexpr(2**31 - 1)  # above any block index


@jit
def ranking(
    score, row, own, begin, end,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr, CAUSAL: tl.constexpr, LOGITS: tl.constexpr,
):  # fmt: skip
    """Order-preserving int32: forced blocks first (own, initial, local), then the higher score.

    Blocks are begin ... end - 1. These and own count from the block of row 0: what a loop counts in
    is 64 bits wide, rows are not.
    """
    rank = (score + 0.0).to(tl.int32, bitcast=True)
    if LOGITS:
        rank = rank ^ ((rank >> 31) & LAST)  # floats as integers of the same order
    rank = tl.where((row < own) & (row > own - LOCAL), LAST - 2, rank)
    rank = tl.where(row < INITIAL + begin, LAST - 1, rank)
    rank = tl.where(row == own, LAST, rank)
    may = row <= own if CAUSAL else row < end
    return tl.where(may, rank, EMPTY)


@jit
def goes_first(rank, tie, other_rank, other_tie):
    """The higher rank, on equal ranks the higher tie: one comparison of 64 bits."""
    mine = (rank.to(tl.int64) << 32) | tie.to(tl.int64)
    return mine > ((other_rank.to(tl.int64) << 32) | other_tie.to(tl.int64))


@jit
def exchange(
    rank, tie, N: tl.constexpr, RUN: tl.constexpr, DISTANCE: tl.constexpr, DOWN: tl.constexpr
):
    """One step of a bitonic sort along axis 0: orders every pair of rows DISTANCE apart.

    Runs of RUN rows go down and up in turns, the first down if DOWN.
    """
    W: tl.constexpr = rank.shape[1]
    PAIRS: tl.constexpr = N // (2 * DISTANCE)
    rank = tl.reshape(rank, [PAIRS, 2, DISTANCE, W])
    tie = tl.reshape(tie, [PAIRS, 2, DISTANCE, W])
    other_rank = rank ^ tl.xor_sum(rank, 1, keep_dims=True)
    other_tie = tie ^ tl.xor_sum(tie, 1, keep_dims=True)
    upper = (tl.arange(0, 2) == 0)[None, :, None, None]
    down = tl.arange(0, PAIRS) * (2 * DISTANCE) // RUN % 2 == (0 if DOWN else 1)
    # Both rows of a pair ask whether the upper one goes first: one comparison serves both.
    first = goes_first(rank, tie, other_rank, other_tie)
    second = goes_first(other_rank, other_tie, rank, tie)
    stays = tl.where(upper, first, second) == down[:, None, None, None]
    rank = tl.where(stays, rank, other_rank)
    tie = tl.where(stays, tie, other_tie)
    return tl.reshape(rank, [N, W]), tl.reshape(tie, [N, W])


@jit
def merge(rank, tie, N: tl.constexpr, LOG_RUN: tl.constexpr, DOWN: tl.constexpr):
    """Sorts runs of 2**LOG_RUN rows, each of them bitonic, down and up in turns."""
    for i in tl.static_range(LOG_RUN):
        rank, tie = exchange(rank, tie, N, 2**LOG_RUN, 2 ** (LOG_RUN - 1 - i), DOWN)
    return rank, tie


@jit
def better(rank, tie, other_rank, other_tie):
    """The one of each pair that goes first."""
    first = goes_first(rank, tie, other_rank, other_tie)
    return tl.where(first, rank, other_rank), tl.where(first, tie, other_tie)


@jit
def widened(x, empty, N: tl.constexpr):
    """[N, W] from [M, W]: copies, all but the first of them emptied."""
    copies: tl.constexpr = N // x.shape[0]
    wide = tl.broadcast_to(x[None, :, :], [copies, x.shape[0], x.shape[1]])
    wide = tl.where((tl.arange(0, copies) == 0)[:, None, None], wide, empty)
    return tl.reshape(wide, [N, x.shape[1]])


@jit
def better_half(rank, tie, LEFT: tl.constexpr, LOG_KEPT: tl.constexpr):
    """LEFT rows of twice as many: of each pair of runs of 2**LOG_KEPT the best, sorted again."""
    KEPT: tl.constexpr = 2**LOG_KEPT
    W: tl.constexpr = rank.shape[1]
    rank = tl.reshape(rank, [LEFT // KEPT, 2, KEPT, W])
    tie = tl.reshape(tie, [LEFT // KEPT, 2, KEPT, W])
    rank, tie = tl.reduce((rank, tie), 1, better)
    rank, tie = tl.reshape(rank, [LEFT, W]), tl.reshape(tie, [LEFT, W])
    return merge(rank, tie, LEFT, LOG_KEPT, False)


@jit
def keep_best(best, best_tie, rank, tie, LOG_ROWS: tl.constexpr, LOG_KEPT: tl.constexpr):
    """The first 2**LOG_KEPT of two sets of blocks along axis 0, best first."""
    KEPT: tl.constexpr = 2**LOG_KEPT
    if LOG_ROWS < LOG_KEPT:
        rank, tie = widened(rank, EMPTY, KEPT), widened(tie, 0, KEPT)
    N: tl.constexpr = 2**LOG_ROWS if LOG_ROWS > LOG_KEPT else 2**LOG_KEPT
    for i in tl.static_range(1, LOG_KEPT + 1):
        rank, tie = merge(rank, tie, N, i, False)
    for i in tl.static_range(LOG_KEPT, LOG_ROWS):
        rank, tie = better_half(rank, tie, N >> (i + 1 - LOG_KEPT), LOG_KEPT)
    # The best go down and the new ones up: the better of each pair are the best, and bitonic.
    best, best_tie = better(best, best_tie, rank, tie)
    return merge(best, best_tie, KEPT, LOG_KEPT, True)


@jit
def one_set(best, best_tie, LOG_KEPT: tl.constexpr):
    """[KEPT, W/2] from [KEPT, W]: the best of each two sets that lie side by side."""
    KEPT: tl.constexpr = 2**LOG_KEPT
    W: tl.constexpr = best.shape[1]
    up = (tl.arange(0, W) % 2 == 1)[None, :]  # the second set upside down: bitonic, as above
    best = tl.reshape(tl.where(up, tl.flip(best, 0), best), [KEPT, W // 2, 2])
    best_tie = tl.reshape(tl.where(up, tl.flip(best_tie, 0), best_tie), [KEPT, W // 2, 2])
    best, best_tie = tl.reduce((best, best_tie), 2, better)
    return merge(best, best_tie, KEPT, LOG_KEPT, True)
