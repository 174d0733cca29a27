"""Selected attention with the block in the outer loop, forward.

A work item loads one selection block and meets the queries that keep it, so K and V are read once
for each block's list instead of once for each query. An item writes its partial results into its
slots, and a second kernel merges the slots of a token by lse. Slots are taken in chunks, whose
partial results are bounded (inverted_lists.py); a chunk begins at token t0 of index head head0.

The first INITIAL blocks of a document and a token's LOCAL last ones are dense: neighbouring tokens
share them, so the merging kernel attends to them itself and they need no partial results.
"""

import triton.language as tl

from nsa.kernels.block_order.inverted_lists import find_item, load_slots
from nsa.kernels.columns import inner_products, load_columns
from nsa.kernels.jit import jit
from nsa.kernels.primitives import LN2, LOG2E, div_mod, finite, load_rows, softmax_step, store_rows
from nsa.kernels.tile_order.visible import document_start


@jit
def first_block(starts_ptr, b, t, T, LENGTH: tl.constexpr):
    """The block in which t's document begins."""
    return document_start(starts_ptr, b, t, T) // LENGTH


@jit
def is_dense(block, own, first, INITIAL: tl.constexpr, LOCAL: tl.constexpr):
    """Whether merge_kernel attends to the block, for a token of block `own` in a document.

    Blocks before its `first` and later ones count as dense, too. Only causal attention has dense
    blocks: it sees none of these.
    """
    return (block < first + INITIAL) | (block > own - LOCAL)


@jit
def has_partial(index_ptrs, live, own, first, INITIAL: tl.constexpr, LOCAL: tl.constexpr):
    """Whether a work item wrote a partial output into a row's slot."""
    block = tl.load(index_ptrs, mask=live, other=-1)
    if INITIAL + LOCAL > 0:
        return (block >= 0) & ~is_dense(block, own, first, INITIAL, LOCAL)
    else:
        return block >= 0


@jit
def num_dense(
    slots_ptr, lo, hi, block, first, token0,
    N: tl.constexpr, LENGTH: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    BLOCK_NEAR: tl.constexpr,
):  # fmt: skip
    """How many of an item's slots are dense: they come first, since their tokens do."""
    offs = lo + tl.arange(0, BLOCK_NEAR)
    t = tl.load(slots_ptr + offs, mask=offs < hi, other=0) // N - token0
    dense = (offs < hi) & is_dense(block, t // LENGTH, first, INITIAL, LOCAL)
    return tl.where(block < first + INITIAL, hi - lo, tl.sum(dense.to(tl.int32), 0))


@jit(do_not_specialize=["chunk", "head0"])
def block_fwd_kernel(
    q_ptr, k_ptr, v_ptr, document_starts_ptr, slots_ptr, starts_ptr, ends_ptr, item_lists_ptr,
    partial_ptr, partial_lse_ptr,
    T, num_blocks, num_lists, chunk, head0, t0, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, LENGTH: tl.constexpr, CAUSAL: tl.constexpr,
    WIDTH: tl.constexpr, PADDED_DV: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    ITEM: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr, BLOCK_NEAR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One work item: a selection block against a run of the query rows that keep it."""
    starts_ptr += chunk * num_lists
    ends_ptr += chunk * num_lists
    item_lists_ptr += chunk * tl.num_programs(0)
    if tl.program_id(0) >= tl.load(ends_ptr + num_lists - 1):
        return
    R: tl.constexpr = H // J
    list_id, _, _, lo, hi = find_item(item_lists_ptr, ends_ptr, starts_ptr, tl.program_id(0), ITEM)
    block, bj = list_id % num_blocks, (head0 + list_id // num_blocks).to(tl.int64)
    b, j = bj // J, bj % J
    token0 = (bj * T).to(tl.int32)  # as slots count
    if INITIAL + LOCAL > 0:
        first = first_block(document_starts_ptr, b, block * LENGTH, T, LENGTH)
        lo += num_dense(
            slots_ptr, lo, hi, block, first, token0, N, LENGTH, INITIAL, LOCAL, BLOCK_NEAR
        )  # fmt: skip
    if lo >= hi:
        return
    offs_s = block * LENGTH + tl.arange(0, KEYS)
    end = tl.minimum((block + 1) * LENGTH, T)
    key_rows = (b * T + offs_s) * G + j // (J // G)
    k = load_columns(k_ptr, key_rows, offs_s < end, D, WIDTH)  # slices of [KEYS, D]
    v = load_rows(v_ptr, key_rows, offs_s < end, DV, PADDED_DV)  # [KEYS, PADDED_DV]
    row0 = b * T * H + j * R
    slot0 = (head0 * T + t0) * N  # the chunk's first
    slot = load_slots(slots_ptr, lo, hi, tl.arange(0, ROWS), R)
    for i0 in range(0, (hi - lo) * R, ROWS):
        offs_i = i0 + tl.arange(0, ROWS)
        live = offs_i < (hi - lo) * R
        r = div_mod(offs_i, R)[1]
        t = div_mod(slot, N)[0] - token0
        rows = row0 + t * H + r  # t * H: no memory holds 2**31 rows of one sequence
        q = load_columns(q_ptr, rows, live, D, WIDTH)  # slices of [ROWS, D]
        s = inner_products(q, k, PRECISION)  # [ROWS, KEYS]
        seen = tl.broadcast_to((offs_s < end)[None, :], [ROWS, KEYS])
        if CAUSAL:
            seen = seen & (offs_s[None, :] <= t[:, None])
        s = tl.where(seen, s, float("-inf"))
        m = tl.max(s, 1) * (scale * LOG2E)
        p = tl.exp2(s * (scale * LOG2E) - finite(m)[:, None])
        norm = tl.sum(p, 1)
        norm = tl.where(norm > 0, norm, 1.0)  # a row that saw nothing: out 0, m and lse -inf
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        partial_row = (slot - slot0).to(tl.int64) * R + r
        store_rows(partial_ptr, partial_row, live, out * (1.0 / norm)[:, None], DV, PADDED_DV)
        tl.store(partial_lse_ptr + partial_row, m + tl.log2(norm), mask=live)
        slot = load_slots(slots_ptr, lo, hi, offs_i + ROWS, R)


@jit
def attend_dense(
    q_ptr, k_ptr, v_ptr, indices_ptr, rows, slots, live, t, first, t_lo, first_lo, t_hi, b, g,
    T, scale,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, LENGTH: tl.constexpr, INITIAL: tl.constexpr,
    LOCAL: tl.constexpr, PADDED_N: tl.constexpr, WIDTH: tl.constexpr, PADDED_DV: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of tokens t_lo ... t_hi over the dense blocks they keep: m, norm and acc so far.

    `first` and first_lo are the blocks in which the documents of the rows and of t_lo begin. Others
    begin behind t_lo, so that all their blocks are met as local ones.
    """
    m = tl.full([rows.shape[0]], float("-inf"), tl.float32)
    norm = tl.zeros([rows.shape[0]], tl.float32)
    acc = tl.zeros([rows.shape[0], PADDED_DV], tl.float32)
    n = tl.arange(0, PADDED_N)[None, :]
    kept = tl.load(indices_ptr + slots[:, None] + n, mask=live[:, None] & (n < N), other=-1)
    q = load_columns(q_ptr, rows, live, D, WIDTH)
    first_local = tl.maximum(t_lo // LENGTH - LOCAL + 1, first_lo + INITIAL)
    num_local = tl.maximum(t_hi // LENGTH + 1 - first_local, 0)
    for i in range(INITIAL + num_local):
        block = tl.where(i < INITIAL, first_lo + i, first_local + i - INITIAL)
        offs_s = block * LENGTH + tl.arange(0, KEYS)
        end = tl.minimum((block + 1) * LENGTH, T)
        key_rows = (b * T + offs_s) * G + g
        k = load_columns(k_ptr, key_rows, offs_s < end, D, WIDTH)  # slices of [KEYS, D]
        v = load_rows(v_ptr, key_rows, offs_s < end, DV, PADDED_DV)  # [KEYS, PADDED_DV]
        s = inner_products(q, k, PRECISION)
        keeps = tl.max((kept == block).to(tl.int32), 1) > 0
        keeps = keeps & is_dense(block, t // LENGTH, first, INITIAL, LOCAL)
        seen = keeps[:, None] & (offs_s[None, :] < tl.minimum(t + 1, end)[:, None])
        s = tl.where(seen, s, float("-inf"))
        m, norm, acc = softmax_step(s, v, m, norm, acc, scale, PRECISION)
    return m, norm, acc


@jit(do_not_specialize=["head0"])
def merge_kernel(
    q_ptr, k_ptr, v_ptr, document_starts_ptr,
    partial_ptr, partial_lse_ptr, indices_ptr, out_ptr, lse_ptr, T, head0, t0, tokens, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, LENGTH: tl.constexpr, INITIAL: tl.constexpr,
    LOCAL: tl.constexpr, PADDED_N: tl.constexpr, WIDTH: tl.constexpr, PADDED_DV: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS packed rows of one index head: dense blocks, and the partial outputs of other slots."""
    R: tl.constexpr = H // J
    num_tiles = tl.cdiv(tokens * R, ROWS)
    bj = (head0 + tl.program_id(0) // num_tiles).to(tl.int64)
    b, j = bj // J, bj % J
    i0 = tl.program_id(0) % num_tiles * ROWS
    offs_i = i0 + tl.arange(0, ROWS)
    live = offs_i < tokens * R
    i, r = div_mod(offs_i, R)
    t = t0 + i
    rows = (b * T + t) * H + j * R + r
    slots = ((b * T + t) * J + j) * N
    partial_rows = ((bj - head0) * T + i) * N * R + r

    own, first = t // LENGTH, first_block(document_starts_ptr, b, t, T, LENGTH)
    if INITIAL + LOCAL > 0:
        t_lo, t_hi = t0 + i0 // R, t0 + tl.minimum((i0 + ROWS - 1) // R, tokens - 1)
        first_lo = first_block(document_starts_ptr, b, t_lo, T, LENGTH)
        m, norm, acc = attend_dense(
            q_ptr, k_ptr, v_ptr, indices_ptr, rows, slots, live, t, first, t_lo, first_lo, t_hi,
            b, j // (J // G), T, scale,
            H, G, N, D, DV, LENGTH, INITIAL, LOCAL, PADDED_N, WIDTH, PADDED_DV, KEYS, PRECISION,
        )  # fmt: skip
    else:
        m = tl.full([ROWS], float("-inf"), tl.float32)
        norm = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, PADDED_DV], tl.float32)
    top = m
    for n in range(N):
        merged = has_partial(indices_ptr + slots + n, live, own, first, INITIAL, LOCAL)
        lse2 = tl.load(partial_lse_ptr + partial_rows + n * R, mask=merged, other=float("-inf"))
        top = tl.maximum(top, lse2)
    weight = tl.exp2(m - finite(top))
    norm *= weight
    acc *= weight[:, None]
    for n in range(N):
        merged = has_partial(indices_ptr + slots + n, live, own, first, INITIAL, LOCAL)
        lse2 = tl.load(partial_lse_ptr + partial_rows + n * R, mask=merged, other=float("-inf"))
        weight = tl.exp2(lse2 - finite(top))
        partial = load_rows(partial_ptr, partial_rows + n * R, merged, DV, PADDED_DV)
        acc += weight[:, None] * partial.to(tl.float32)
        norm += weight
    norm = tl.where(norm > 0, norm, 1.0)
    store_rows(out_ptr, rows, live, acc / norm[:, None], DV, PADDED_DV)
    tl.store(lse_ptr + rows, (top + tl.log2(norm)) * LN2, mask=live)
