"""Selected attention with the block in the outer loop.

Each selection block is loaded once a work item and meets the queries that keep it, so K and V are
read once a list instead of once a query. An item writes its partial result into its slots, and a
second kernel merges the slots of a token by lse. Slots are taken in chunks, whose partial results
are bounded (lists.py); a chunk begins at token t0 of index head head0. Nothing is added atomically:
one program at a time sums a block's dK and dV, in the order of its items.
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


@triton.jit(do_not_specialize=["chunk", "head0"])
@no_type_check
def block_fwd_kernel(
    q_ptr, k_ptr, v_ptr, slots_ptr, starts_ptr, ends_ptr, item_lists_ptr, part_ptr, part_lse_ptr,
    T, num_blocks, num_lists, chunk, head0, t0, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, LENGTH: tl.constexpr, CAUSAL: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    ITEM: tl.constexpr, PRECISION: tl.constexpr,
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
    offs_s = block * LENGTH + tl.arange(0, KEYS)
    end = tl.minimum((block + 1) * LENGTH, T)
    key_rows = (b * T + offs_s) * G + j // (J // G)
    k = load_rows(k_ptr, key_rows, offs_s < end, D, BLOCK_D)  # [KEYS, BLOCK_D]
    v = load_rows(v_ptr, key_rows, offs_s < end, DV, BLOCK_DV)  # [KEYS, BLOCK_DV]
    token0 = (bj * T).to(tl.int32)  # as slots count
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


@triton.jit(do_not_specialize=["head0"])
@no_type_check
def merge_kernel(
    part_ptr, part_lse_ptr, indices_ptr, out_ptr, lse_ptr, T, head0, t0, tokens,
    H: tl.constexpr, J: tl.constexpr, N: tl.constexpr,
    DV: tl.constexpr, BLOCK_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS packed rows of one index head: their slots' partial outputs, weighted by lse."""
    R: tl.constexpr = H // J
    num_tiles = tl.cdiv(tokens * R, ROWS)
    bj = (head0 + tl.program_id(0) // num_tiles).to(tl.int64)
    b, j = bj // J, bj % J
    offs_i = tl.program_id(0) % num_tiles * ROWS + tl.arange(0, ROWS)
    live = offs_i < tokens * R
    i, r = div_mod(offs_i, R)
    t = t0 + i
    slots = ((b * T + t) * J + j) * N
    parts = ((bj - head0) * T + i) * N * R + r

    m = tl.full([ROWS], float("-inf"), tl.float32)
    for n in range(N):
        kept = tl.load(indices_ptr + slots + n, mask=live, other=-1) >= 0
        lse2 = tl.load(part_lse_ptr + parts + n * R, mask=kept, other=float("-inf"))
        m = tl.maximum(m, lse2)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_DV], tl.float32)
    for n in range(N):
        kept = tl.load(indices_ptr + slots + n, mask=live, other=-1) >= 0
        lse2 = tl.load(part_lse_ptr + parts + n * R, mask=kept, other=float("-inf"))
        weight = tl.exp2(lse2 - finite(m))
        part = load_rows(part_ptr, parts + n * R, kept, DV, BLOCK_DV)
        acc += weight[:, None] * part.to(tl.float32)
        norm += weight
    norm = tl.where(norm > 0, norm, 1.0)
    rows = (b * T + t) * H + j * R + r
    store_rows(out_ptr, rows, live, acc / norm[:, None], DV, BLOCK_DV)
    tl.store(lse_ptr + rows, (m + tl.log2(norm)) * LN2, mask=live)


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

    A list of one item adds to dk and dv itself; the items of a longer one write partial sums. Where
    a head's tokens are in one chunk, dk and dv were 0 and have the inputs' dtype.
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
        dk = add_parts(dk, load_parts(dk_ptr, sums, offs_s < end, D, PART))
        dv = add_parts(dv, load_parts(dv_ptr, sums, offs_s < end, DV, PART_V))
        store_parts(dk_ptr, sums, offs_s < end, dk, D, PART)
        store_parts(dv_ptr, sums, offs_s < end, dv, DV, PART_V)
    else:
        part_block = (tl.load(shared_ends_ptr + lst) - count + place).to(tl.int64)
        part_rows = part_block * LENGTH + tl.arange(0, KEYS)
        store_parts(part_dk_ptr, part_rows, offs_s < end, dk, D, PART)
        store_parts(part_dv_ptr, part_rows, offs_s < end, dv, DV, PART_V)


@triton.jit(do_not_specialize=["chunk", "head0"])
@no_type_check
def sum_items_kernel(
    part_ptr, sum_ptr, ends_ptr, shared_ends_ptr, T, num_blocks, chunk, head0,
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
    acc = load_rows(sum_ptr, rows, live, D, BLOCK_D).to(tl.float32)
    first = (tl.load(shared_ends_ptr + lst) - count).to(tl.int64)
    offs = tl.arange(0, ITEMS * KEYS)
    key = tl.program_id(1) * KEYS + offs % KEYS
    for i0 in range(0, count, ITEMS):
        item = i0 + offs // KEYS
        live_part = (item < count) & (key < LENGTH) & (block * LENGTH + key < T)
        part = load_rows(part_ptr, (first + item) * LENGTH + key, live_part, D, BLOCK_D)
        acc += tl.sum(tl.reshape(part, [ITEMS, KEYS, BLOCK_D]), 0)
    store_rows(sum_ptr, rows, live, acc, D, BLOCK_D)


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
