"""Selected attention with the block in the outer loop.

Each selection block is loaded once a work item and meets the queries that keep it, so K and V are
read once a list instead of once a query. An item writes its partial result into its slots, and a
second kernel merges the slots of a token by lse. Slots are taken in chunks, whose partial results
are bounded (lists.py); a chunk begins at token t0 of index head head0. Nothing is added atomically:
one program at a time sums a block's dK and dV, in the order of its items.

The first INITIAL blocks and a token's LOCAL last ones are dense: neighbouring tokens share them, so
forward the merging kernel attends to them itself and they need no partial results. Backward they
are slots like the others, since their dK and dV have to be summed over tokens all the same.
"""

from typing import no_type_check

import triton
import triton.language as tl

from nsa.kernels.lists import find_item
from nsa.kernels.parts import (
    add_parts,
    add_product,
    inner_products,
    load_parts,
    store_part,
    store_parts,
    zero_parts,
)
from nsa.kernels.primitives import (
    LN2,
    LOG2E,
    div_mod,
    finite,
    load_lse2,
    load_rows,
    row_delta,
    softmax_step,
    store_rows,
)


@triton.jit
@no_type_check
def load_slots(slots_ptr, lo, hi, offs_i, R: tl.constexpr):
    """The slots of packed rows of an item.

    Called a tile ahead: queries can be gathered early only if their addresses are known by then.
    """
    i = div_mod(offs_i, R)[0]
    return tl.load(slots_ptr + lo + i, mask=lo + i < hi, other=0)


@triton.jit
@no_type_check
def is_dense(block, own, INITIAL: tl.constexpr, LOCAL: tl.constexpr):
    """Whether merge_kernel attends to the block, for a token whose own block is `own`.

    So it says of later blocks, too: dense blocks are for causal attention, which sees none of them.
    """
    return (block < INITIAL) | (block > own - LOCAL)


@triton.jit
@no_type_check
def has_part(index_ptrs, live, own, INITIAL: tl.constexpr, LOCAL: tl.constexpr):
    """Whether a work item wrote a partial output into a row's slot."""
    block = tl.load(index_ptrs, mask=live, other=-1)
    if INITIAL + LOCAL > 0:
        return (block >= 0) & ~is_dense(block, own, INITIAL, LOCAL)
    else:
        return block >= 0


@triton.jit
@no_type_check
def num_dense(
    slots_ptr, lo, hi, block, token0,
    N: tl.constexpr, LENGTH: tl.constexpr, INITIAL: tl.constexpr, LOCAL: tl.constexpr,
    BLOCK_NEAR: tl.constexpr,
):  # fmt: skip
    """How many of an item's slots are dense: they come first, since their tokens do."""
    offs = lo + tl.arange(0, BLOCK_NEAR)
    t = tl.load(slots_ptr + offs, mask=offs < hi, other=0) // N - token0
    dense = (offs < hi) & is_dense(block, t // LENGTH, INITIAL, LOCAL)
    return tl.where(block < INITIAL, hi - lo, tl.sum(dense.to(tl.int32), 0))


@triton.jit(do_not_specialize=["chunk", "head0"])
@no_type_check
def block_fwd_kernel(
    q_ptr, k_ptr, v_ptr, slots_ptr, starts_ptr, ends_ptr, item_lists_ptr, part_ptr, part_lse_ptr,
    T, num_blocks, num_lists, chunk, head0, t0, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, LENGTH: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
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
    lst, _, _, lo, hi = find_item(item_lists_ptr, ends_ptr, starts_ptr, tl.program_id(0), ITEM)
    block, bj = lst % num_blocks, (head0 + lst // num_blocks).to(tl.int64)
    b, j = bj // J, bj % J
    token0 = (bj * T).to(tl.int32)  # as slots count
    if INITIAL + LOCAL > 0:
        lo += num_dense(
            slots_ptr, lo, hi, block, token0, N, LENGTH, INITIAL, LOCAL, BLOCK_NEAR
        )  # fmt: skip
    if lo >= hi:
        return
    offs_s = block * LENGTH + tl.arange(0, KEYS)
    end = tl.minimum((block + 1) * LENGTH, T)
    key_rows = (b * T + offs_s) * G + j // (J // G)
    k = load_rows(k_ptr, key_rows, offs_s < end, D, BLOCK_D)  # [KEYS, BLOCK_D]
    v = load_rows(v_ptr, key_rows, offs_s < end, DV, BLOCK_DV)  # [KEYS, BLOCK_DV]
    row0 = b * T * H + j * R
    slot0 = (head0 * T + t0) * N  # the chunk's first
    slot = load_slots(slots_ptr, lo, hi, tl.arange(0, ROWS), R)
    for i0 in range(0, (hi - lo) * R, ROWS):
        offs_i = i0 + tl.arange(0, ROWS)
        live = offs_i < (hi - lo) * R
        r = div_mod(offs_i, R)[1]
        t = div_mod(slot, N)[0] - token0
        rows = row0 + t * H + r  # t * H: no memory holds 2**31 rows of one sequence
        q = load_rows(q_ptr, rows, live, D, BLOCK_D)  # [ROWS, BLOCK_D]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)  # [ROWS, KEYS]
        seen = tl.broadcast_to((offs_s < end)[None, :], [ROWS, KEYS])
        if CAUSAL:
            seen = seen & (offs_s[None, :] <= t[:, None])
        s = tl.where(seen, s, float("-inf"))
        m = tl.max(s, 1) * (scale * LOG2E)
        p = tl.exp2(s * (scale * LOG2E) - finite(m)[:, None])
        norm = tl.sum(p, 1)
        norm = tl.where(norm > 0, norm, 1.0)  # a row that saw nothing: out 0, m and lse -inf
        out = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
        part = (slot - slot0).to(tl.int64) * R + r
        store_rows(part_ptr, part, live, out * (1.0 / norm)[:, None], DV, BLOCK_DV)
        tl.store(part_lse_ptr + part, m + tl.log2(norm), mask=live)
        slot = load_slots(slots_ptr, lo, hi, offs_i + ROWS, R)


@triton.jit
@no_type_check
def attend_dense(
    q_ptr, k_ptr, v_ptr, indices_ptr, rows, slots, live, t, t_lo, t_hi, b, g, T, scale,
    H: tl.constexpr, G: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, LENGTH: tl.constexpr, INITIAL: tl.constexpr,
    LOCAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows of tokens t_lo ... t_hi over the dense blocks they keep: m, norm and acc so far."""
    m = tl.full([rows.shape[0]], float("-inf"), tl.float32)
    norm = tl.zeros([rows.shape[0]], tl.float32)
    acc = tl.zeros([rows.shape[0], BLOCK_DV], tl.float32)
    n = tl.arange(0, BLOCK_N)[None, :]
    kept = tl.load(indices_ptr + slots[:, None] + n, mask=live[:, None] & (n < N), other=-1)
    q = load_rows(q_ptr, rows, live, D, BLOCK_D)
    first_local = tl.maximum(t_lo // LENGTH - LOCAL + 1, INITIAL)
    num_local = tl.maximum(t_hi // LENGTH + 1 - first_local, 0)
    for i in range(INITIAL + num_local):
        block = tl.where(i < INITIAL, i, first_local + i - INITIAL)
        offs_s = block * LENGTH + tl.arange(0, KEYS)
        end = tl.minimum((block + 1) * LENGTH, T)
        key_rows = (b * T + offs_s) * G + g
        k = load_rows(k_ptr, key_rows, offs_s < end, D, BLOCK_D)  # [KEYS, BLOCK_D]
        v = load_rows(v_ptr, key_rows, offs_s < end, DV, BLOCK_DV)  # [KEYS, BLOCK_DV]
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        keeps = tl.max((kept == block).to(tl.int32), 1) > 0
        keeps = keeps & is_dense(block, t // LENGTH, INITIAL, LOCAL)
        seen = keeps[:, None] & (offs_s[None, :] < tl.minimum(t + 1, end)[:, None])
        s = tl.where(seen, s, float("-inf"))
        m, norm, acc = softmax_step(s, v, m, norm, acc, scale, PRECISION)
    return m, norm, acc


@triton.jit(do_not_specialize=["head0"])
@no_type_check
def merge_kernel(
    q_ptr, k_ptr, v_ptr, part_ptr, part_lse_ptr, indices_ptr, out_ptr, lse_ptr,
    T, head0, t0, tokens, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, LENGTH: tl.constexpr, INITIAL: tl.constexpr,
    LOCAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
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
    parts = ((bj - head0) * T + i) * N * R + r

    if INITIAL + LOCAL > 0:
        t_hi = t0 + tl.minimum((i0 + ROWS - 1) // R, tokens - 1)
        m, norm, acc = attend_dense(
            q_ptr, k_ptr, v_ptr, indices_ptr, rows, slots, live, t, t0 + i0 // R, t_hi,
            b, j // (J // G), T, scale,
            H, G, N, D, DV, LENGTH, INITIAL, LOCAL, BLOCK_N, BLOCK_D, BLOCK_DV, KEYS, PRECISION,
        )  # fmt: skip
    else:
        m = tl.full([ROWS], float("-inf"), tl.float32)
        norm = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    own = t // LENGTH
    top = m
    for n in range(N):
        merged = has_part(indices_ptr + slots + n, live, own, INITIAL, LOCAL)
        lse2 = tl.load(part_lse_ptr + parts + n * R, mask=merged, other=float("-inf"))
        top = tl.maximum(top, lse2)
    weight = tl.exp2(m - finite(top))
    norm *= weight
    acc *= weight[:, None]
    for n in range(N):
        merged = has_part(indices_ptr + slots + n, live, own, INITIAL, LOCAL)
        lse2 = tl.load(part_lse_ptr + parts + n * R, mask=merged, other=float("-inf"))
        weight = tl.exp2(lse2 - finite(top))
        part = load_rows(part_ptr, parts + n * R, merged, DV, BLOCK_DV)
        acc += weight[:, None] * part.to(tl.float32)
        norm += weight
    norm = tl.where(norm > 0, norm, 1.0)
    store_rows(out_ptr, rows, live, acc / norm[:, None], DV, BLOCK_DV)
    tl.store(lse_ptr + rows, (top + tl.log2(norm)) * LN2, mask=live)


@triton.jit
@no_type_check
def delta_kernel(
    out_ptr, dout_ptr, delta_ptr, num_rows,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows: their delta."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < num_rows
    dout = load_rows(dout_ptr, rows, live, DV, BLOCK_DV)
    tl.store(delta_ptr + rows, row_delta(out_ptr, dout, None, rows, live, DV, BLOCK_DV), mask=live)


@triton.jit(do_not_specialize=["chunk", "head0"])
@no_type_check
def block_bwd_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr,
    slots_ptr, starts_ptr, ends_ptr, item_lists_ptr, shared_ends_ptr,
    part_dq_ptr, part_dgate_ptr, part_dk_ptr, part_dv_ptr, dk_ptr, dv_ptr,
    T, num_blocks, num_lists, chunk, head0, t0, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, LENGTH: tl.constexpr, CAUSAL: tl.constexpr,
    GATES: tl.constexpr, AHEAD: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, ITEM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One work item: dQ (and the gate's gradient) into its slots; dK and dV of its block.

    A list of one item adds to dk and dv itself; the items of a longer one write partial sums. The
    first chunk of a head finds nothing to add to. If it is the only one, dk and dv have the inputs'
    dtype.
    """
    starts_ptr += chunk * num_lists
    ends_ptr += chunk * num_lists
    shared_ends_ptr += chunk * num_lists
    item_lists_ptr += chunk * tl.num_programs(0)
    if tl.program_id(0) >= tl.load(ends_ptr + num_lists - 1):
        return
    R: tl.constexpr = H // J
    PART: tl.constexpr = 64 if BLOCK_D > 64 else BLOCK_D
    PART_V: tl.constexpr = 64 if BLOCK_DV > 64 else BLOCK_DV
    KEYS_FIRST: tl.constexpr = KEYS > 64  # which axis of scores: whatever spills less
    lst, place, count, lo, hi = find_item(
        item_lists_ptr, ends_ptr, starts_ptr, tl.program_id(0), ITEM
    )
    if (lo >= hi) & (t0 > 0):
        return
    block, bj = lst % num_blocks, (head0 + lst // num_blocks).to(tl.int64)
    b, j = bj // J, bj % J
    offs_s = block * LENGTH + tl.arange(0, KEYS)
    end = tl.minimum((block + 1) * LENGTH, T)
    key_rows = (b * T + offs_s) * G + j // (J // G)
    k = load_parts(k_ptr, key_rows, offs_s < end, D, PART)  # parts of [KEYS, D]
    v = load_parts(v_ptr, key_rows, offs_s < end, DV, PART_V)  # parts of [KEYS, DV]
    dk = zero_parts(KEYS, D, PART)
    dv = zero_parts(KEYS, DV, PART_V)
    token0 = (bj * T).to(tl.int32)  # as slots count
    row0 = b * T * H + j * R
    slot0 = (head0 * T + t0) * N  # the chunk's first
    slot = load_slots(slots_ptr, lo, hi, tl.arange(0, ROWS), R)  # unused if not AHEAD
    for i0 in range(0, (hi - lo) * R, ROWS):
        offs_i = i0 + tl.arange(0, ROWS)
        live = offs_i < (hi - lo) * R
        i, r = div_mod(offs_i, R)
        if not AHEAD:  # wide heads leave no registers for the slots of two tiles
            slot = tl.load(slots_ptr + lo + i, mask=live, other=0)
        t = div_mod(slot, N)[0] - token0
        rows = row0 + t * H + r  # t * H: no memory holds 2**31 rows of one sequence
        q = load_parts(q_ptr, rows, live, D, PART)  # parts of [ROWS, D]
        dout = load_parts(dout_ptr, rows, live, DV, PART_V)  # parts of [ROWS, DV]
        lse2 = load_lse2(lse_ptr, rows, live)
        delta = tl.load(delta_ptr + rows, mask=live, other=0.0) * scale
        if KEYS_FIRST:  # scores are [KEYS, ROWS]
            s, dp = inner_products(k, q, PRECISION), inner_products(v, dout, PRECISION)
            keys, tokens, lse2, delta = offs_s[:, None], t[None, :], lse2[None, :], delta[None, :]
        else:  # [ROWS, KEYS]
            s, dp = inner_products(q, k, PRECISION), inner_products(dout, v, PRECISION)
            keys, tokens, lse2, delta = offs_s[None, :], t[:, None], lse2[:, None], delta[:, None]
        seen = tl.broadcast_to(keys < end, s.shape)
        if CAUSAL:
            seen = seen & (keys <= tokens)
        p = tl.where(seen, tl.exp2(s * (scale * LOG2E) - lse2), 0.0)
        ds = (p * (dp * scale - delta)).to(k[0].dtype)
        p = p.to(v[0].dtype)
        if KEYS_FIRST:
            dv = add_product(dv, p, dout, PRECISION)
            dk = add_product(dk, ds, q, PRECISION)
            ds = tl.trans(ds)
        else:
            dv = add_product(dv, tl.trans(p), dout, PRECISION)
            dk = add_product(dk, tl.trans(ds), q, PRECISION)
        part = (slot - slot0).to(tl.int64) * R + r
        dgate = tl.zeros([ROWS], tl.float32)
        for i in tl.static_range(len(k)):  # one part after the other: fewer registers
            dq = tl.dot(ds, k[i], input_precision=PRECISION)
            store_part(part_dq_ptr, part, live, dq, i, D, PART)
            if GATES:  # a factor on a row's scores: its gradient is the sum of dS * S, or Q * dQ
                dgate += tl.sum(q[i].to(tl.float32) * dq, 1)
        if GATES:
            tl.store(part_dgate_ptr + part, dgate, mask=live)
        if AHEAD:
            slot = load_slots(slots_ptr, lo, hi, offs_i + ROWS, R)
    sums = (b * T + offs_s) * J + j  # rows of dk and dv
    if count == 1:
        there = (offs_s < end) & (t0 > 0)
        dk = add_parts(dk, load_parts(dk_ptr, sums, there, D, PART))
        dv = add_parts(dv, load_parts(dv_ptr, sums, there, DV, PART_V))
        store_parts(dk_ptr, sums, offs_s < end, dk, D, PART)
        store_parts(dv_ptr, sums, offs_s < end, dv, DV, PART_V)
    else:
        part_block = (tl.load(shared_ends_ptr + lst) - count + place).to(tl.int64)
        part_rows = part_block * LENGTH + tl.arange(0, KEYS)
        store_parts(part_dk_ptr, part_rows, offs_s < end, dk, D, PART)
        store_parts(part_dv_ptr, part_rows, offs_s < end, dv, DV, PART_V)


@triton.jit
@no_type_check
def sum_items(
    part_ptr, sum_ptr, ends_ptr, shared_ends_ptr, T, num_blocks, chunk, head0, t0,
    J: tl.constexpr, D: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK_D: tl.constexpr, KEYS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """One list of several items: their partial dK (or dV), ITEMS at a time, onto its block's."""
    lst = tl.program_id(0)
    ends_ptr += chunk * tl.num_programs(0)
    shared_ends_ptr += chunk * tl.num_programs(0)
    count = tl.load(ends_ptr + lst) - tl.load(ends_ptr + lst - 1, mask=lst > 0, other=0)
    if count <= 1:
        return
    block, bj = lst % num_blocks, (head0 + lst // num_blocks).to(tl.int64)
    keys = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    live = (keys < LENGTH) & (block * LENGTH + keys < T)
    rows = (bj // J * T + block * LENGTH + keys) * J + bj % J
    acc = load_rows(sum_ptr, rows, live & (t0 > 0), D, BLOCK_D).to(tl.float32)
    first = (tl.load(shared_ends_ptr + lst) - count).to(tl.int64)
    offs = tl.arange(0, ITEMS * KEYS)
    key = tl.program_id(1) * KEYS + offs % KEYS
    for i0 in range(0, count, ITEMS):
        item = i0 + offs // KEYS
        live_part = (item < count) & (key < LENGTH) & (block * LENGTH + key < T)
        part = load_rows(part_ptr, (first + item) * LENGTH + key, live_part, D, BLOCK_D)
        acc += tl.sum(tl.reshape(part, [ITEMS, KEYS, BLOCK_D]), 0)
    store_rows(sum_ptr, rows, live, acc, D, BLOCK_D)


@triton.jit(do_not_specialize=["chunk", "head0"])
@no_type_check
def sum_items_kernel(
    part_dk_ptr, part_dv_ptr, dk_ptr, dv_ptr, ends_ptr, shared_ends_ptr,
    T, num_blocks, chunk, head0, t0,
    J: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, LENGTH: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, KEYS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Program (list, KEYS of its keys, 0) sums the items' dK, program (..., 1) their dV."""
    if tl.program_id(2) == 0:
        sum_items(
            part_dk_ptr, dk_ptr, ends_ptr, shared_ends_ptr, T, num_blocks, chunk, head0, t0,
            J, D, LENGTH, BLOCK_D, KEYS, ITEMS,
        )  # fmt: skip
    else:
        sum_items(
            part_dv_ptr, dv_ptr, ends_ptr, shared_ends_ptr, T, num_blocks, chunk, head0, t0,
            J, DV, LENGTH, BLOCK_DV, KEYS, ITEMS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["head0"])
@no_type_check
def sum_slots_kernel(
    part_ptr, indices_ptr, dq_ptr, T, head0, t0, tokens,
    H: tl.constexpr, J: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS packed rows of one index head: dQ is the sum over their slots."""
    R: tl.constexpr = H // J
    num_tiles = tl.cdiv(tokens * R, ROWS)
    bj = (head0 + tl.program_id(0) // num_tiles).to(tl.int64)
    b, j = bj // J, bj % J
    offs_i = tl.program_id(0) % num_tiles * ROWS + tl.arange(0, ROWS)
    live = offs_i < tokens * R
    i, r = div_mod(offs_i, R)
    t = t0 + i
    parts = ((bj - head0) * T + i) * N * R + r
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for n in range(N):
        kept = tl.load(indices_ptr + ((b * T + t) * J + j) * N + n, mask=live, other=-1) >= 0
        acc += load_rows(part_ptr, parts + n * R, kept, D, BLOCK_D).to(tl.float32)
    store_rows(dq_ptr, (b * T + t) * H + j * R + r, live, acc, D, BLOCK_D)
