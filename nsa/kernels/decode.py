"""Decoding: one query of a sequence against its cache, split over many programs.

A query has no rows to fill a GPU, so its keys are cut into parts. Four launches a step:

    attend_compressed_kernel  a part of the compressed keys: scores, and softmax so far (eq. 7)
    choose_kernel             eq. 8-11 from the scores, for one query and index head
    attend_tokens_kernel      a part of the selected blocks (eq. 12), or of the window
    merge_kernel              the parts of every branch, and the gated sum (eq. 5)

The R query heads of a key head are the rows of a tile. The grid follows from the cache's size, what
is read from the sequence's length, which is in device memory: the host never waits.
Floor, in keys and values a key head: n*l' + T/d + w; scores add 2*R/D of the compressed keys.
"""

# pyright: reportCallIssue=false

import torch
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.best_blocks import EMPTY, LAST, ranking
from nsa.kernels.jit import jit
from nsa.kernels.primitives import (
    LOG2E,
    cdiv,
    finite,
    load_rows,
    num_multiprocessors,
    operands,
    padded,
    power_of_2,
    precision,
    softmax_step,
    store_rows,
)

KEYS = 64  # of a tile
MOST_PARTS = 64  # of a branch


@jit
def visible_blocks(t, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """How many compressed blocks have ended at position t."""
    return tl.maximum(t + 1 - SIZE + STRIDE, 0) // STRIDE


@jit
def store_part(
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
    scores_ptr, acc_ptr, m_ptr, norm_ptr, n, C, num_parts, scale,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, MEMORIES: tl.constexpr, PADDED_M: tl.constexpr,
    PARTS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of one query's compressed keys, for the heads of one key head."""
    R: tl.constexpr = H // G
    row = tl.program_id(0).to(tl.int64)
    g, part = tl.program_id(1), tl.program_id(2)
    b = row // n
    t = tl.load(positions_ptr + row).to(tl.int32)
    visible = visible_blocks(t, SIZE, STRIDE)
    share = tl.cdiv(tl.cdiv(visible, KEYS), PARTS) * KEYS
    begin = part * share
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
            q, mem_k_ptr, mem_v_ptr, g * MEMORIES + i, (i < MEMORIES) & (part == 0),
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
    rows = (row * num_parts + part) * H + g * R + r
    store_part(acc_ptr, m_ptr, norm_ptr, rows, live, m, norm, acc, D, PADDED_D)


@jit
def part_weights(
    m_ptr, norm_ptr, first, head, H: tl.constexpr, PARTS: tl.constexpr, P: tl.constexpr
):
    """What each part's sum counts for a head, their norm in all, and their maximum in base 2."""
    p = tl.arange(0, P)
    at = (first + p) * H + head
    m = tl.load(m_ptr + at, mask=p < PARTS, other=float("-inf"))
    top = tl.max(m, 0)
    weight = tl.exp2(m - finite(top))
    norm = tl.sum(tl.load(norm_ptr + at, mask=p < PARTS, other=0.0) * weight, 0)
    return weight, norm, top


@jit
def choose_kernel(
    scores_ptr, m_ptr, norm_ptr, positions_ptr, indices_ptr, C, num_parts,
    H: tl.constexpr, J: tl.constexpr, N: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr,
    INITIAL: tl.constexpr, LOCAL: tl.constexpr, LOGITS: tl.constexpr,
    PARTS: tl.constexpr, P: tl.constexpr, S: tl.constexpr, LANES: tl.constexpr,
    KEPT: tl.constexpr,
):  # fmt: skip
    """The n best blocks of one query and index head: column (s, i) is compressed block s*RATIO + i.

    A block takes its share of the compressed blocks that begin in it, and of those that begin in
    the block before and reach into it.
    """
    RATIO: tl.constexpr = LENGTH // STRIDE
    row, j = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = tl.load(positions_ptr + row).to(tl.int32)
    visible = visible_blocks(t, SIZE, STRIDE)
    s, i = tl.arange(0, S), tl.arange(0, LANES)[None, :]
    c = s[:, None] * RATIO + i  # [S, LANES]
    own_weight = tl.where(i < RATIO, tl.minimum(SIZE, (RATIO - i) * STRIDE), 0)
    spilled_weight = tl.where(i < RATIO, tl.maximum(SIZE - (RATIO - i) * STRIDE, 0), 0)
    own_weight = tl.where(c < visible, own_weight, 0).to(tl.float32) / STRIDE
    before = c - RATIO
    seen_before = (before >= 0) & (before < visible)
    spilled_weight = tl.where(seen_before, spilled_weight, 0).to(tl.float32) / STRIDE

    score = tl.zeros([S], tl.float32)
    for k in range(H // J):
        head = j * (H // J) + k
        base = scores_ptr + (row * H + head) * C
        own = tl.load(base + c, mask=own_weight > 0, other=0.0)
        spilled = tl.load(base + before, mask=spilled_weight > 0, other=0.0)
        if not LOGITS:
            _, norm, top = part_weights(m_ptr, norm_ptr, row * num_parts, head, H, PARTS, P)
            lse2 = finite(top) + tl.log2(tl.where(norm > 0, norm, 1.0))
            own, spilled = tl.exp2(own - lse2), tl.exp2(spilled - lse2)
        own = tl.where(own_weight > 0, own * own_weight, 0.0)
        spilled = tl.where(spilled_weight > 0, spilled * spilled_weight, 0.0)
        score += tl.sum(own + spilled, 1)
    if LOGITS:
        weight = tl.sum(own_weight + spilled_weight, 1)
        score = tl.where(weight > 0, score / tl.where(weight > 0, weight, 1.0), -3.4028234e38)
    rank = ranking(score, s, t // LENGTH, 0, S, INITIAL, LOCAL, True, LOGITS)
    key = (rank.to(tl.int64) << 32) | (-s + LAST).to(tl.int64)
    place = tl.arange(0, KEPT)
    blocks = tl.full([KEPT], LAST, tl.int32)
    gone = tl.full([S], EMPTY, tl.int64) << 32
    for k in range(N):
        best = tl.max(key, 0)
        block = tl.where((best >> 32) == EMPTY, LAST, -(best & LAST).to(tl.int32) + LAST)
        blocks = tl.where(place == k, block, blocks)
        key = tl.where(key == best, gone, key)
    blocks = tl.sort(blocks)
    out = indices_ptr + (row * J + j) * N + place
    tl.store(out, tl.where(blocks == LAST, -1, blocks), mask=place < N)


@jit
def attend_tokens_kernel(
    q_ptr, k_slc_ptr, v_slc_ptr, k_win_ptr, v_win_ptr, indices_ptr, positions_ptr,
    acc_ptr, m_ptr, norm_ptr, n, K, RING, first_part, num_parts, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    N: tl.constexpr, LENGTH: tl.constexpr, WINDOW: tl.constexpr,
    SELECTED_PARTS: tl.constexpr, WINDOW_PARTS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One part of one query's selected blocks, or of its window, for the heads of an index head."""
    R: tl.constexpr = H // J
    PIECES: tl.constexpr = (LENGTH + KEYS - 1) // KEYS
    row = tl.program_id(0).to(tl.int64)
    j, part = tl.program_id(1), tl.program_id(2)
    g, b = j // (J // G), row // n
    t = tl.load(positions_ptr + row).to(tl.int32)
    r, key = tl.arange(0, ROWS), tl.arange(0, KEYS)
    live = r < R
    q = load_rows(q_ptr, row * H + j * R + r, live, D, PADDED_D)  # [ROWS, PADDED_D]
    m = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED_D], tl.float32)
    if part < SELECTED_PARTS:
        share: tl.constexpr = (N * PIECES + SELECTED_PARTS - 1) // SELECTED_PARTS if N else 0
        for i in range(part * share, tl.minimum(part * share + share, N * PIECES)):
            block = tl.load(indices_ptr + (row * J + j) * N + i // PIECES)
            inside = i % PIECES * KEYS + key
            token = block * LENGTH + inside
            exists = (block >= 0) & (inside < LENGTH) & (token <= t)
            m, norm, acc, _ = attend_tile(
                q, k_slc_ptr, v_slc_ptr, (b * K + token) * G + g, exists,
                m, norm, acc, scale, D, PADDED_D, PRECISION,
            )  # fmt: skip
    else:
        share: tl.constexpr = (WINDOW + KEYS * WINDOW_PARTS - 1) // (KEYS * WINDOW_PARTS) * KEYS
        begin = tl.maximum(t + 1 - WINDOW, 0)
        start = begin + (part - SELECTED_PARTS) * share
        for first in range(start, tl.minimum(start + share, t + 1), KEYS):
            token = first + key
            m, norm, acc, _ = attend_tile(
                q, k_win_ptr, v_win_ptr, (b * RING + token % RING) * G + g, token <= t,
                m, norm, acc, scale, D, PADDED_D, PRECISION,
            )  # fmt: skip
    rows = (row * num_parts + first_part + part) * H + j * R + r
    store_part(acc_ptr, m_ptr, norm_ptr, rows, live, m, norm, acc, D, PADDED_D)


@jit
def branch_output(
    acc_ptr, m_ptr, norm_ptr, first, head,
    H: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    PARTS: tl.constexpr, P: tl.constexpr,
):  # fmt: skip
    """A head's output from the parts of one branch; 0 where nothing was seen.  [PADDED_D]"""
    weight, norm, _ = part_weights(m_ptr, norm_ptr, first, head, H, PARTS, P)
    p = tl.arange(0, P)
    acc = load_rows(acc_ptr, (first + p) * H + head, p < PARTS, D, PADDED_D)  # [P, PADDED_D]
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
    """One head of one query: A parts compressed, B selected, C of the window, and their gates."""
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


def num_parts(programs: int, tiles: int, device: torch.device) -> int:
    """Into how many parts to cut the keys of a query, where `programs` would run uncut."""
    wanted = cdiv(2 * num_multiprocessors(device), programs)
    return max(1, min(wanted, tiles, MOST_PARTS))


def cached_attention(
    q: Float[Tensor, "B n H D"],
    q_rot: Float[Tensor, "B n H D"],
    gates: Float[Tensor, "B n H 3"],
    compressed: tuple[Float[Tensor, "B C G D"], Float[Tensor, "B C G D"]],
    selected: tuple[Float[Tensor, "B K G D"], Float[Tensor, "B K G D"]],
    window: tuple[Float[Tensor, "B Ring G D"], Float[Tensor, "B Ring G D"]],
    positions: Int[Tensor, "B n"],
    cfg: NSAConfig,
    mem_k: Float[Tensor, "G Nm D"] | None = None,
    mem_v: Float[Tensor, "G Nm D"] | None = None,
    *,
    shared: bool = True,
    compressed_output: bool = True,
) -> tuple[Float[Tensor, "B n H D"], Int[Tensor, "B n J N"]]:
    """The gated sum of the branches for queries at `positions`, and the blocks they select.

    Every key up to a query's own is in the buffers already. The window's is a ring: token t in
    slot t % Ring, and Ring >= w + n - 1.
    """
    (B, n, H, D), G = q.shape, compressed[0].shape[2]
    q, q_rot, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = operands(
        q, q_rot, *compressed, *selected, *window
    )
    gates, positions = gates.contiguous(), positions.contiguous()
    C, K, J, N = k_cmp.shape[1], k_slc.shape[1], G if shared else H, cfg.num_selected_blocks
    length, rows = cfg.selection_block_size, B * n
    pieces = cdiv(length, KEYS)
    parts_cmp = num_parts(rows * G, cdiv(C, KEYS), q.device)
    parts_slc = num_parts(rows * J, N * pieces, q.device) if N else 0
    parts_win = num_parts(2 * rows * J, cdiv(cfg.sliding_window_size, KEYS), q.device)
    parts = parts_cmp + parts_slc + parts_win

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=q.device)

    acc, m, norm = new(rows, parts, H, D), new(rows, parts, H), new(rows, parts, H)
    scores = new(rows, H, C)
    indices = new(B, n, J, N, dtype=torch.int32)
    out = torch.empty_like(q)
    memories = 0 if mem_k is None else mem_k.shape[1]
    mem = (q, q) if mem_k is None or mem_v is None else (mem_k.contiguous(), mem_v.contiguous())
    heads = dict(H=H, G=G, D=D, PADDED_D=padded(D), KEYS=KEYS, PRECISION=precision())
    sizes = dict(SIZE=cfg.compress_block_size, STRIDE=cfg.compress_block_sliding_stride)
    with torch.cuda.device_of(q):
        attend_compressed_kernel[(rows, G, parts_cmp)](
            q, k_cmp, v_cmp, *mem, positions, scores, acc, m, norm, n, C, parts, D**-0.5,
            **heads, **sizes, MEMORIES=memories, PADDED_M=padded(memories), PARTS=parts_cmp,
            ROWS=padded(H // G), num_warps=4, num_stages=3,
        )  # fmt: skip
        if N:
            S = power_of_2(max(cdiv(K, length), 16))
            choose_kernel[(rows, J)](
                scores, m, norm, positions, indices, C, parts,
                H=H, J=J, N=N, **sizes, LENGTH=length, INITIAL=cfg.num_initial_blocks,
                LOCAL=cfg.num_local_blocks, LOGITS=cfg.importance == "logit_mean",
                PARTS=parts_cmp, P=power_of_2(parts_cmp), S=S,
                LANES=power_of_2(length // cfg.compress_block_sliding_stride),
                KEPT=power_of_2(N), num_warps=8 if S <= 1024 else 16,
            )  # fmt: skip
        attend_tokens_kernel[(rows, J, parts_slc + parts_win)](
            q_rot, k_slc, v_slc, k_win, v_win, indices, positions,
            acc, m, norm, n, K, k_win.shape[1], parts_cmp, parts, D**-0.5,
            **heads, J=J, N=N, LENGTH=length, WINDOW=cfg.sliding_window_size,
            SELECTED_PARTS=parts_slc, WINDOW_PARTS=parts_win,
            ROWS=padded(H // J), num_warps=4, num_stages=2,
        )  # fmt: skip
        merge_kernel[(rows, H)](
            acc, m, norm, gates, out, H=H, D=D, PADDED_D=padded(D),
            A=parts_cmp, B=parts_slc, C=parts_win, PADDED_A=power_of_2(parts_cmp),
            PADDED_B=power_of_2(parts_slc), PADDED_C=power_of_2(parts_win),
            COMPRESSED=compressed_output, num_warps=2,
        )  # fmt: skip
    return out, indices
