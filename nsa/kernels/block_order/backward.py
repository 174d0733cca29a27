"""Selected attention with the block in the outer loop, backward (forward.py).

Dense blocks are slots like the others here, since their dK and dV have to be summed over tokens all
the same. Nothing is added atomically: one program at a time sums a block's dK and dV, in the order
of its items.
"""

import triton.language as tl

from nsa.kernels.block_order.inverted_lists import find_item, load_slots
from nsa.kernels.columns import (
    add_columns,
    add_product,
    inner_products,
    load_columns,
    store_column,
    store_columns,
    zero_columns,
)
from nsa.kernels.jit import jit
from nsa.kernels.primitives import LOG2E, div_mod, load_lse2, load_rows, row_delta, store_rows


@jit
def delta_kernel(
    out_ptr, dout_ptr, delta_ptr, num_rows,
    DV: tl.constexpr, PADDED_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows: their delta."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < num_rows
    dout = load_rows(dout_ptr, rows, live, DV, PADDED_DV)
    tl.store(delta_ptr + rows, row_delta(out_ptr, dout, None, rows, live, DV, PADDED_DV), mask=live)


@jit
def weights_and_gradients(
    q, dout, k, v, lse2, delta, offs_s, end, t, scale,
    CAUSAL: tl.constexpr, KEYS_FIRST: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """P and dS of a tile of rows and a block: [KEYS, ROWS] if KEYS_FIRST, else [ROWS, KEYS]."""
    if KEYS_FIRST:
        s, dp = inner_products(k, q, PRECISION), inner_products(v, dout, PRECISION)
        keys, tokens, lse2, delta = offs_s[:, None], t[None, :], lse2[None, :], delta[None, :]
    else:
        s, dp = inner_products(q, k, PRECISION), inner_products(dout, v, PRECISION)
        keys, tokens, lse2, delta = offs_s[None, :], t[:, None], lse2[:, None], delta[:, None]
    seen = tl.broadcast_to(keys < end, s.shape)
    if CAUSAL:
        seen = seen & (keys <= tokens)
    p = tl.where(seen, tl.exp2(s * (scale * LOG2E) - lse2), 0.0)
    ds = (p * (dp * scale - delta)).to(k[0].dtype)
    return p.to(v[0].dtype), ds


@jit
def store_slot_gradients(
    partial_dq_ptr, partial_dgate_ptr, partial_row, live, ds, q, k,
    D: tl.constexpr, WIDTH: tl.constexpr, GATES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Rows' partial dQ, and with GATES their partial gradients of gates.  ds is [ROWS, KEYS]"""
    dgate = tl.zeros([ds.shape[0]], tl.float32)
    for i in tl.static_range(len(k)):  # one slice after the other: fewer registers
        dq = tl.dot(ds, k[i], input_precision=PRECISION)
        store_column(partial_dq_ptr, partial_row, live, dq, i, D, WIDTH)
        if GATES:  # a factor on a row's scores: its gradient is the sum of dS * S, or Q * dQ
            dgate += tl.sum(q[i].to(tl.float32) * dq, 1)
    if GATES:
        tl.store(partial_dgate_ptr + partial_row, dgate, mask=live)


@jit(do_not_specialize=["chunk", "head0"])
def block_bwd_kernel(
    q_ptr, k_ptr, v_ptr, dout_ptr, lse_ptr, delta_ptr,
    slots_ptr, starts_ptr, ends_ptr, item_lists_ptr, shared_ends_ptr,
    partial_dq_ptr, partial_dgate_ptr, partial_dk_ptr, partial_dv_ptr, dk_ptr, dv_ptr,
    T, num_blocks, num_lists, chunk, head0, t0, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, DV: tl.constexpr, LENGTH: tl.constexpr, CAUSAL: tl.constexpr,
    GATES: tl.constexpr, AHEAD: tl.constexpr, WIDTH: tl.constexpr, WIDTH_V: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, ITEM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One work item: dQ, and the gate's gradient, into its slots; dK and dV of its block.

    A list of one item adds to dk and dv itself; the items of a longer one write partial sums. A
    head's first chunk does not add: it writes. If it is the only one, dk and dv are in v's dtype.
    """
    starts_ptr += chunk * num_lists
    ends_ptr += chunk * num_lists
    shared_ends_ptr += chunk * num_lists
    item_lists_ptr += chunk * tl.num_programs(0)
    if tl.program_id(0) >= tl.load(ends_ptr + num_lists - 1):
        return
    R: tl.constexpr = H // J
    KEYS_FIRST: tl.constexpr = KEYS > 64  # which axis of scores: whatever spills less
    list_id, place, count, lo, hi = find_item(
        item_lists_ptr, ends_ptr, starts_ptr, tl.program_id(0), ITEM
    )
    if (lo >= hi) & (t0 > 0):
        return
    block, bj = list_id % num_blocks, (head0 + list_id // num_blocks).to(tl.int64)
    b, j = bj // J, bj % J
    offs_s = block * LENGTH + tl.arange(0, KEYS)
    end = tl.minimum((block + 1) * LENGTH, T)
    key_rows = (b * T + offs_s) * G + j // (J // G)
    k = load_columns(k_ptr, key_rows, offs_s < end, D, WIDTH)  # slices of [KEYS, D]
    v = load_columns(v_ptr, key_rows, offs_s < end, DV, WIDTH_V)  # slices of [KEYS, DV]
    dk, dv = zero_columns(KEYS, D, WIDTH), zero_columns(KEYS, DV, WIDTH_V)
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
        q = load_columns(q_ptr, rows, live, D, WIDTH)  # slices of [ROWS, D]
        dout = load_columns(dout_ptr, rows, live, DV, WIDTH_V)  # slices of [ROWS, DV]
        lse2 = load_lse2(lse_ptr, rows, live)
        delta = tl.load(delta_ptr + rows, mask=live, other=0.0) * scale
        p, ds = weights_and_gradients(
            q, dout, k, v, lse2, delta, offs_s, end, t, scale, CAUSAL, KEYS_FIRST, PRECISION
        )
        if KEYS_FIRST:
            dv = add_product(dv, p, dout, PRECISION)
            dk = add_product(dk, ds, q, PRECISION)
            ds = tl.trans(ds)
        else:
            dv = add_product(dv, tl.trans(p), dout, PRECISION)
            dk = add_product(dk, tl.trans(ds), q, PRECISION)
        partial_row = (slot - slot0).to(tl.int64) * R + r
        store_slot_gradients(
            partial_dq_ptr,
            partial_dgate_ptr,
            partial_row,
            live,
            ds,
            q,
            k,
            D,
            WIDTH,
            GATES,
            PRECISION,
        )
        if AHEAD:
            slot = load_slots(slots_ptr, lo, hi, offs_i + ROWS, R)
    sums = (b * T + offs_s) * J + j  # rows of dk and dv
    if count == 1:
        there = (offs_s < end) & (t0 > 0)
        dk = add_columns(dk, load_columns(dk_ptr, sums, there, D, WIDTH))
        dv = add_columns(dv, load_columns(dv_ptr, sums, there, DV, WIDTH_V))
        store_columns(dk_ptr, sums, offs_s < end, dk, D, WIDTH)
        store_columns(dv_ptr, sums, offs_s < end, dv, DV, WIDTH_V)
    else:
        partial_block = (tl.load(shared_ends_ptr + list_id) - count + place).to(tl.int64)
        partial_rows = partial_block * LENGTH + tl.arange(0, KEYS)
        store_columns(partial_dk_ptr, partial_rows, offs_s < end, dk, D, WIDTH)
        store_columns(partial_dv_ptr, partial_rows, offs_s < end, dv, DV, WIDTH_V)


@jit
def sum_items(
    partial_ptr, sum_ptr, ends_ptr, shared_ends_ptr, T, num_blocks, chunk, head0, t0,
    J: tl.constexpr, D: tl.constexpr, LENGTH: tl.constexpr,
    PADDED_D: tl.constexpr, KEYS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """One list of several items: their partial dK (or dV), ITEMS at a time, onto its block's."""
    list_id = tl.program_id(0)
    ends_ptr += chunk * tl.num_programs(0)
    shared_ends_ptr += chunk * tl.num_programs(0)
    count = tl.load(ends_ptr + list_id) - tl.load(ends_ptr + list_id - 1, mask=list_id > 0, other=0)
    if count <= 1:
        return
    block, bj = list_id % num_blocks, (head0 + list_id // num_blocks).to(tl.int64)
    keys = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    live = (keys < LENGTH) & (block * LENGTH + keys < T)
    rows = (bj // J * T + block * LENGTH + keys) * J + bj % J
    acc = load_rows(sum_ptr, rows, live & (t0 > 0), D, PADDED_D).to(tl.float32)
    first = (tl.load(shared_ends_ptr + list_id) - count).to(tl.int64)
    offs = tl.arange(0, ITEMS * KEYS)
    key = tl.program_id(1) * KEYS + offs % KEYS
    for i0 in range(0, count, ITEMS):
        item = i0 + offs // KEYS
        live_partial = (item < count) & (key < LENGTH) & (block * LENGTH + key < T)
        partial = load_rows(partial_ptr, (first + item) * LENGTH + key, live_partial, D, PADDED_D)
        acc += tl.sum(tl.reshape(partial, [ITEMS, KEYS, PADDED_D]), 0)
    store_rows(sum_ptr, rows, live, acc, D, PADDED_D)


@jit(do_not_specialize=["chunk", "head0"])
def sum_items_kernel(
    partial_dk_ptr, partial_dv_ptr, dk_ptr, dv_ptr, ends_ptr, shared_ends_ptr,
    T, num_blocks, chunk, head0, t0,
    J: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, LENGTH: tl.constexpr,
    PADDED_D: tl.constexpr, PADDED_DV: tl.constexpr, KEYS: tl.constexpr, ITEMS: tl.constexpr,
):  # fmt: skip
    """Program (list, KEYS of its keys, 0) sums the items' dK, program (..., 1) their dV."""
    if tl.program_id(2) == 0:
        sum_items(
            partial_dk_ptr, dk_ptr, ends_ptr, shared_ends_ptr, T, num_blocks, chunk, head0, t0,
            J, D, LENGTH, PADDED_D, KEYS, ITEMS,
        )  # fmt: skip
    else:
        sum_items(
            partial_dv_ptr, dv_ptr, ends_ptr, shared_ends_ptr, T, num_blocks, chunk, head0, t0,
            J, DV, LENGTH, PADDED_DV, KEYS, ITEMS,
        )  # fmt: skip


@jit(do_not_specialize=["head0"])
def sum_slots_kernel(
    partial_ptr, indices_ptr, dq_ptr, T, head0, t0, tokens,
    H: tl.constexpr, J: tl.constexpr, N: tl.constexpr,
    D: tl.constexpr, PADDED_D: tl.constexpr, ROWS: tl.constexpr,
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
    partial_rows = ((bj - head0) * T + i) * N * R + r
    acc = tl.zeros([ROWS, PADDED_D], tl.float32)
    for n in range(N):
        kept = tl.load(indices_ptr + ((b * T + t) * J + j) * N + n, mask=live, other=-1) >= 0
        acc += load_rows(partial_ptr, partial_rows + n * R, kept, D, PADDED_D).to(tl.float32)
    store_rows(dq_ptr, (b * T + t) * H + j * R + r, live, acc, D, PADDED_D)
