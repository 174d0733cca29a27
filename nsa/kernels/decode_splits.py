"""Kernels of decoding that attend: each program to a split of a query's keys; then the merge.

The R query heads of a key head are the rows of a tile. A split leaves its softmax so far.
"""

# pyright: reportCallIssue=false

import triton.language as tl

from nsa.kernels.decode_select import best_blocks, store_ascending, visible_blocks
from nsa.kernels.jit import jit
from nsa.kernels.primitives import LOG2E, finite, load_rows, softmax_step, store_rows


@jit
def store_split(
    acc_ptr, m_ptr, norm_ptr, rows, live, m, norm, acc, D: tl.constexpr, PADDED_D: tl.constexpr
):
    """Softmax so far: sum of weighted values, maximum in base 2, sum of exponents."""
    store_rows(acc_ptr, rows, live, acc, D, PADDED_D)
    tl.store(m_ptr + rows, m, mask=live)
    tl.store(norm_ptr + rows, norm, mask=live)


@jit
def attend_tile(
    q, k_ptr, v_ptr, rows, exists, m, norm, acc, scale,
    D: tl.constexpr, PADDED_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One more tile of keys.  Also: its unscaled scores [ROWS, KEYS]."""
    k = load_rows(k_ptr, rows, exists, D, PADDED_D)  # [KEYS, PADDED_D]
    v = load_rows(v_ptr, rows, exists, D, PADDED_D)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    s = tl.where(exists[None, :], scores, float("-inf"))
    m, norm, acc = softmax_step(s, v, m, norm, acc, scale, PRECISION)
    return m, norm, acc, scores


@jit
def attend_compressed_kernel(
    q_ptr, k_ptr, v_ptr, mem_k_ptr, mem_v_ptr, positions_ptr,
    scores_ptr, acc_ptr, m_ptr, norm_ptr, n, C, num_splits, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, MEMORIES: tl.constexpr, PADDED_M: tl.constexpr,
    SPLITS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of one query's compressed keys, for the heads of one key head."""
    R: tl.constexpr = H // G
    row = tl.program_id(0).to(tl.int64)
    g, split = tl.program_id(1), tl.program_id(2)
    b = row // n
    t = tl.load(positions_ptr + row).to(tl.int32)
    visible = visible_blocks(t, SIZE, STRIDE)
    share = tl.cdiv(tl.cdiv(visible, KEYS), SPLITS) * KEYS
    begin = split * share
    end = tl.minimum(begin + share, visible)

    r = tl.arange(0, ROWS)
    live = r < R
    heads = row * H + g * R + r
    q = load_rows(q_ptr, heads, live, D, PADDED_D)  # [ROWS, PADDED_D]
    m = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED_D], tl.float32)
    if MEMORIES > 0:
        i = tl.arange(0, PADDED_M)
        m, norm, acc, _ = attend_tile(
            q, mem_k_ptr, mem_v_ptr, g * MEMORIES + i, (i < MEMORIES) & (split == 0),
            m, norm, acc, scale, D, PADDED_D, PRECISION,
        )  # fmt: skip
    for start in range(begin, end, KEYS):
        c = start + tl.arange(0, KEYS)
        exists = c < end
        m, norm, acc, scores = attend_tile(
            q, k_ptr, v_ptr, (b * C + c) * G + g, exists,
            m, norm, acc, scale, D, PADDED_D, PRECISION,
        )  # fmt: skip
        out = scores_ptr + heads[:, None] * C + c[None, :]
        tl.store(out, scores * (scale * LOG2E), mask=live[:, None] & exists[None, :])
    rows = (row * num_splits + split) * H + g * R + r
    store_split(acc_ptr, m_ptr, norm_ptr, rows, live, m, norm, acc, D, PADDED_D)


@jit
def attend_tokens_kernel(
    q_ptr, k_slc_ptr, v_slc_ptr, k_win_ptr, v_win_ptr, ranks_ptr, indices_ptr, positions_ptr,
    acc_ptr, m_ptr, norm_ptr, n, K, RING, S, first_split, num_splits, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    N: tl.constexpr, PADDED_S: tl.constexpr, KEPT: tl.constexpr,
    LENGTH: tl.constexpr, WINDOW: tl.constexpr,
    SELECTED_SPLITS: tl.constexpr, WINDOW_SPLITS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One split of one query's selected blocks, or of its window, for the heads of an index head.

    Each split of the selection finds the blocks anew, which takes less than a launch; the first one
    stores them.
    """
    R: tl.constexpr = H // J
    PIECES: tl.constexpr = (LENGTH + KEYS - 1) // KEYS
    row = tl.program_id(0).to(tl.int64)
    j, split = tl.program_id(1), tl.program_id(2)
    g, b = j // (J // G), row // n
    t = tl.load(positions_ptr + row).to(tl.int32)
    r, key = tl.arange(0, ROWS), tl.arange(0, KEYS)
    live = r < R
    q = load_rows(q_ptr, row * H + j * R + r, live, D, PADDED_D)  # [ROWS, PADDED_D]
    m = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED_D], tl.float32)
    if split < SELECTED_SPLITS:
        share: tl.constexpr = (N * PIECES + SELECTED_SPLITS - 1) // SELECTED_SPLITS if N else 0
        blocks = best_blocks(ranks_ptr + (row * J + j) * S, S, N, PADDED_S, KEPT)
        if split == 0:
            store_ascending(blocks, indices_ptr + (row * J + j) * N, N, KEPT)
        for i in range(split * share, tl.minimum(split * share + share, N * PIECES)):
            block = tl.max(tl.where(tl.arange(0, KEPT) == i // PIECES, blocks, -1), 0)
            inside = i % PIECES * KEYS + key
            token = block * LENGTH + inside
            exists = (block >= 0) & (inside < LENGTH) & (token <= t)
            m, norm, acc, _ = attend_tile(
                q, k_slc_ptr, v_slc_ptr, (b * K + token) * G + g, exists,
                m, norm, acc, scale, D, PADDED_D, PRECISION,
            )  # fmt: skip
    else:
        share: tl.constexpr = (WINDOW + KEYS * WINDOW_SPLITS - 1) // (KEYS * WINDOW_SPLITS) * KEYS
        begin = tl.maximum(t + 1 - WINDOW, 0)
        start = begin + (split - SELECTED_SPLITS) * share
        for first in range(start, tl.minimum(start + share, t + 1), KEYS):
            token = first + key
            m, norm, acc, _ = attend_tile(
                q, k_win_ptr, v_win_ptr, (b * RING + token % RING) * G + g, token <= t,
                m, norm, acc, scale, D, PADDED_D, PRECISION,
            )  # fmt: skip
    rows = (row * num_splits + first_split + split) * H + j * R + r
    store_split(acc_ptr, m_ptr, norm_ptr, rows, live, m, norm, acc, D, PADDED_D)


@jit
def split_weights(
    m_ptr, norm_ptr, first, head, H: tl.constexpr, SPLITS: tl.constexpr, P: tl.constexpr
):
    """What each split's sum counts for a head, their norm in all, and their maximum in base 2."""
    p = tl.arange(0, P)
    at = (first + p) * H + head
    m = tl.load(m_ptr + at, mask=p < SPLITS, other=float("-inf"))
    top = tl.max(m, 0)
    weight = tl.exp2(m - finite(top))
    norm = tl.sum(tl.load(norm_ptr + at, mask=p < SPLITS, other=0.0) * weight, 0)
    return weight, norm, top


@jit
def branch_output(
    acc_ptr, m_ptr, norm_ptr, first, head,
    H: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    SPLITS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A head's output from the splits of one branch; 0 where nothing was seen.  [PADDED_D]"""
    weight, norm, _ = split_weights(m_ptr, norm_ptr, first, head, H, SPLITS, P)
    p = tl.arange(0, P)
    acc = load_rows(acc_ptr, (first + p) * H + head, p < SPLITS, D, PADDED_D)  # [P, PADDED_D]
    total = tl.sum(acc * weight[:, None], 0)
    return total / tl.where(norm > 0, norm, 1.0)


@jit
def merge_kernel(
    acc_ptr, m_ptr, norm_ptr, gates_ptr, out_ptr,
    H: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    A: tl.constexpr, B: tl.constexpr, C: tl.constexpr,
    PADDED_A: tl.constexpr, PADDED_B: tl.constexpr, PADDED_C: tl.constexpr,
    COMPRESSED: tl.constexpr,
):  # fmt: skip
    """One head of one query: A splits compressed, B selected, C of the window, and their gates."""
    row, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    first = row * (A + B + C)
    gates = gates_ptr + (row * H + head) * 3
    out = tl.zeros([PADDED_D], tl.float32)
    if COMPRESSED:
        compressed = branch_output(
            acc_ptr, m_ptr, norm_ptr, first, head, H, D, PADDED_D, A, PADDED_A
        )
        out += tl.load(gates).to(tl.float32) * compressed
    if B > 0:
        selected = branch_output(
            acc_ptr, m_ptr, norm_ptr, first + A, head, H, D, PADDED_D, B, PADDED_B
        )
        out += tl.load(gates + 1).to(tl.float32) * selected
    sliding = branch_output(
        acc_ptr, m_ptr, norm_ptr, first + A + B, head, H, D, PADDED_D, C, PADDED_C
    )
    out += tl.load(gates + 2).to(tl.float32) * sliding
    d = tl.arange(0, PADDED_D)
    out = out.to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row * H + head) * D + d, out, mask=d < D)
