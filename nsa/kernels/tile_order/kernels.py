"""Flash attention of query tiles under a mask: one forward, one backward.

The three branches differ only in which keys a token sees. `seen_keys` (visible.py) gives each token
one interval [first, end) of keys. Both ends grow with the token, so a tile knows which key tiles to
visit, and that only those at the edges of the interval need masking. The masks:

    prefix  compressed attention: memory keys, then every compressed block that has ended
    band    sliding window: the last w tokens
    bits    selected attention: all tokens so far, and a bit for every selection block

The arrays that a loop streams come as `*_tiles`: descriptors if DESCRIBED, else pointers
(descriptors.py).

"bits" reads words [B, J, W, T]: bit s % 32 of word s // 32 says that the token keeps block s.
"""

import triton.language as tl

from nsa.kernels.columns import (
    add_columns,
    add_product,
    inner_products,
    load_columns,
    scale_columns,
    store_columns,
    zero_columns,
)
from nsa.kernels.descriptors import load_tile, load_tile_columns
from nsa.kernels.jit import jit
from nsa.kernels.primitives import (
    LN2,
    LOG2E,
    div_mod,
    load_lse2,
    load_rows,
    row_delta,
    softmax_step,
    store_rows,
)
from nsa.kernels.tile_order.visible import (
    document_end,
    document_start,
    has_bit,
    key_range,
    leap,
    seeing_tokens,
    seen_keys,
    sees,
    word_row,
)


@jit(do_not_specialize=["num_words"])
def attend_fwd_kernel(
    q_ptr, k_tiles, k_rest, v_tiles, words_ptr, starts_ptr, out_ptr, lse_ptr,
    T, num_keys, num_words, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr,
    SPAN: tl.constexpr, STRIDE: tl.constexpr, MEMORY: tl.constexpr,
    WIDTH: tl.constexpr, PADDED_DV: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS packed query rows of one index head pass over the key tiles they see."""
    R: tl.constexpr = H // J
    num_tiles = tl.cdiv(T * R, ROWS)
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles  # the longest first
    bj = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, j = bj // J, bj % J
    g = j // (J // G)

    offs_i = tile * ROWS + tl.arange(0, ROWS)
    live = offs_i < T * R
    t, r = div_mod(offs_i, R)
    rows = (b * T + t) * H + j * R + r
    q = load_columns(q_ptr, rows, live, D, WIDTH)  # slices of [ROWS, D]
    t_lo = tile * ROWS // R
    t_hi = tl.minimum((tile * ROWS + ROWS - 1) // R, T - 1)
    starts = document_start(starts_ptr, b, t, T)
    first, end = seen_keys(t, starts, num_keys, MASK, CAUSAL, SPAN, STRIDE, MEMORY)
    start = document_start(starts_ptr, b, t_lo, T)
    s_lo, full_hi = seen_keys(t_lo, start, num_keys, MASK, CAUSAL, SPAN, STRIDE, MEMORY)
    start = document_start(starts_ptr, b, t_hi, T)
    full_lo, s_hi = seen_keys(t_hi, start, num_keys, MASK, CAUSAL, SPAN, STRIDE, MEMORY)
    DOCUMENTS: tl.constexpr = starts_ptr is not None
    s_lo, s_hi, distance = key_range(s_lo, s_hi, MASK, MEMORY, KEYS, DOCUMENTS)

    m = tl.full([ROWS], float("-inf"), tl.float32)
    norm = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, PADDED_DV], tl.float32)
    for s0 in range(s_lo, s_hi, KEYS):
        s0 = leap(s0, distance, MEMORY, KEYS, DOCUMENTS)
        offs_s = s0 + tl.arange(0, KEYS)
        key_rows = (b * num_keys + offs_s) * G + g
        live_s = offs_s < num_keys
        k = load_tile_columns(
            k_tiles, k_rest, key_rows, live_s, b, s0, num_keys, g, D, WIDTH, DESCRIBED
        )
        v = load_tile(v_tiles, key_rows, live_s, b, s0, num_keys, g, 0, DV, PADDED_DV, DESCRIBED)
        s = inner_products(q, k, PRECISION)  # [ROWS, KEYS]
        if (s0 < full_lo) | (s0 + KEYS > full_hi):
            seen = sees(offs_s[None, :], first[:, None], end[:, None], MEMORY)
            s = tl.where(seen, s, float("-inf"))
        if MASK == "bits":
            word = tl.load(word_row(words_ptr, bj, num_words, T, s0, SPAN) + t, mask=live, other=0)
            s = tl.where(has_bit(word[:, None], offs_s[None, :], SPAN), s, float("-inf"))
        m, norm, acc = softmax_step(s, v, m, norm, acc, scale, PRECISION)
    norm = tl.where(norm > 0, norm, 1.0)  # a row that saw nothing: out 0, m and lse -inf
    store_rows(out_ptr, rows, live, acc / norm[:, None], DV, PADDED_DV)
    tl.store(lse_ptr + rows, (m + tl.log2(norm)) * LN2, mask=live)


@jit(do_not_specialize=["num_words"])
def attend_dq_kernel(
    q_ptr, k_tiles, k_rest, v_tiles, words_ptr, starts_ptr,
    out_ptr, dout_ptr, lse_ptr, dlse_ptr, delta_ptr, dq_ptr,
    T, num_keys, num_words, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr,
    SPAN: tl.constexpr, STRIDE: tl.constexpr, MEMORY: tl.constexpr,
    WIDTH: tl.constexpr, PADDED_DV: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    ADD: tl.constexpr, DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The query gradient of ROWS packed rows: the forward's pass again, with dS for P.

    Also their delta, which attend_dkv_kernel reads, unless it is known: then out is None. With ADD
    the gradient goes onto what dq holds.
    """
    R: tl.constexpr = H // J
    num_tiles = tl.cdiv(T * R, ROWS)
    tile = num_tiles - 1 - tl.program_id(0) % num_tiles
    bj = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, j = bj // J, bj % J
    g = j // (J // G)

    offs_i = tile * ROWS + tl.arange(0, ROWS)
    live = offs_i < T * R
    t, r = div_mod(offs_i, R)
    rows = (b * T + t) * H + j * R + r
    q = load_columns(q_ptr, rows, live, D, WIDTH)  # slices of [ROWS, D]
    dout = load_rows(dout_ptr, rows, live, DV, PADDED_DV)  # [ROWS, PADDED_DV]
    lse2 = load_lse2(lse_ptr, rows, live)
    if out_ptr is None:
        delta = tl.load(delta_ptr + rows, mask=live, other=0.0)
    else:
        delta = row_delta(out_ptr, dout, dlse_ptr, rows, live, DV, PADDED_DV)
        tl.store(delta_ptr + rows, delta, mask=live)
    t_lo = tile * ROWS // R
    t_hi = tl.minimum((tile * ROWS + ROWS - 1) // R, T - 1)
    starts = document_start(starts_ptr, b, t, T)
    first, end = seen_keys(t, starts, num_keys, MASK, CAUSAL, SPAN, STRIDE, MEMORY)
    start = document_start(starts_ptr, b, t_lo, T)
    s_lo, full_hi = seen_keys(t_lo, start, num_keys, MASK, CAUSAL, SPAN, STRIDE, MEMORY)
    start = document_start(starts_ptr, b, t_hi, T)
    full_lo, s_hi = seen_keys(t_hi, start, num_keys, MASK, CAUSAL, SPAN, STRIDE, MEMORY)
    DOCUMENTS: tl.constexpr = starts_ptr is not None
    s_lo, s_hi, distance = key_range(s_lo, s_hi, MASK, MEMORY, KEYS, DOCUMENTS)

    dq = zero_columns(ROWS, D, WIDTH)
    for s0 in range(s_lo, s_hi, KEYS):
        s0 = leap(s0, distance, MEMORY, KEYS, DOCUMENTS)
        offs_s = s0 + tl.arange(0, KEYS)
        key_rows = (b * num_keys + offs_s) * G + g
        live_s = offs_s < num_keys
        k = load_tile_columns(
            k_tiles, k_rest, key_rows, live_s, b, s0, num_keys, g, D, WIDTH, DESCRIBED
        )
        v = load_tile(v_tiles, key_rows, live_s, b, s0, num_keys, g, 0, DV, PADDED_DV, DESCRIBED)
        s = inner_products(q, k, PRECISION) * (scale * LOG2E)
        p = tl.exp2(s - lse2[:, None])  # [ROWS, KEYS]
        if (s0 < full_lo) | (s0 + KEYS > full_hi):
            seen = sees(offs_s[None, :], first[:, None], end[:, None], MEMORY)
            p = tl.where(seen, p, 0.0)
        if MASK == "bits":
            word = tl.load(word_row(words_ptr, bj, num_words, T, s0, SPAN) + t, mask=live, other=0)
            p = tl.where(has_bit(word[:, None], offs_s[None, :], SPAN), p, 0.0)
        dp = tl.dot(dout, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(k[0].dtype)
        dq = add_product(dq, ds, k, PRECISION)
    dq = scale_columns(dq, scale)
    if ADD:
        dq = add_columns(dq, load_columns(dq_ptr, rows, live, D, WIDTH))
    store_columns(dq_ptr, rows, live, dq, D, WIDTH)


@jit
def shared_start(i_lo, i_hi, ROWS: tl.constexpr):
    """How far into its rows a key tile of the band begins, and how long its round of them is.

    Key tiles side by side share most of their rows. With n tiles of rows in a round, tile a is met
    in iteration a % n: by all that share it at once, all but one of them from L2.
    """
    tiles = tl.maximum(tl.cdiv(i_hi - i_lo, ROWS), 1)
    first = tiles - 1 - (i_lo // ROWS + tiles - 1) % tiles
    return first * ROWS, tiles * ROWS


@jit(do_not_specialize=["num_words", "batch", "splits"])
def attend_dkv_kernel(
    q_tiles, q_rest, k_ptr, v_ptr, words_ptr, ends_ptr, dout_tiles,
    lse_ptr, delta_ptr, dk_ptr, dv_ptr,
    T, num_keys, num_words, batch, splits, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    MASK: tl.constexpr, CAUSAL: tl.constexpr,
    SPAN: tl.constexpr, STRIDE: tl.constexpr, MEMORY: tl.constexpr,
    WIDTH: tl.constexpr, PADDED_DV: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    DESCRIBED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of KEYS keys from one of `splits` runs of tokens.

    dk and dv are [splits, B, num_keys, J, D]; whoever launches this sums them in a fixed order. The
    tiles of a run follow one another, so they pass over the same rows at the same time: from L2.
    """
    R: tl.constexpr = H // J
    num_tiles = tl.cdiv(num_keys, KEYS)
    tile = tl.program_id(0) % num_tiles
    bj = (tl.program_id(0) // num_tiles % (batch * J)).to(tl.int64)
    # The last run first: most key tiles have work in it.
    split = splits - 1 - tl.program_id(0) // num_tiles // (batch * J)
    b, j = bj // J, bj % J
    g = j // (J // G)

    s0 = tile * KEYS
    offs_s = s0 + tl.arange(0, KEYS)
    live_s = offs_s < num_keys
    key_rows = (b * num_keys + offs_s) * G + g
    k = load_columns(k_ptr, key_rows, live_s, D, WIDTH)  # slices of [KEYS, D]
    v = load_rows(v_ptr, key_rows, live_s, DV, PADDED_DV)  # [KEYS, PADDED_DV]
    s_hi = tl.minimum(s0 + KEYS, num_keys) - 1
    t_lo, t_hi = seeing_tokens(s0, s_hi, T, MASK, CAUSAL, SPAN, STRIDE, MEMORY)
    until = document_end(ends_ptr, b, offs_s, live_s, T, MASK, STRIDE, MEMORY)
    if ends_ptr is not None:
        t_hi = tl.minimum(t_hi, tl.max(tl.where(live_s, until, 0), 0))
    first_end = tl.min(until, 0)
    # A run is whole tiles. A row behind i_hi is either behind T, and then 0, or sees none of these
    # keys, and then masked: loaded by descriptor it has its own values.
    run = tl.cdiv(tl.cdiv(T, splits), ROWS) * ROWS
    i_lo = tl.maximum(t_lo, split * run) * R // ROWS * ROWS
    i_hi = tl.minimum(t_hi, (split + 1) * run) * R

    dk = zero_columns(KEYS, D, WIDTH)
    dv = tl.zeros([KEYS, PADDED_DV], tl.float32)
    behind, round_ = shared_start(i_lo, i_hi, ROWS)
    for i0 in range(i_lo, i_hi, ROWS):
        if MASK == "band":
            i0 += behind
            i0 = tl.where(i0 < i_lo + round_, i0, i0 - round_)
        offs_i = i0 + tl.arange(0, ROWS)
        live = offs_i < i_hi
        t, r = div_mod(offs_i, R)
        rows = (b * T + t) * H + j * R + r
        t0 = i0 // R
        q = load_tile_columns(q_tiles, q_rest, rows, live, b, t0, T, j * R, D, WIDTH, DESCRIBED)
        dout = load_tile(dout_tiles, rows, live, b, t0, T, j * R, 0, DV, PADDED_DV, DESCRIBED)
        lse2 = load_lse2(lse_ptr, rows, live)
        delta = tl.load(delta_ptr + rows, mask=live, other=0.0)
        s = inner_products(k, q, PRECISION) * (scale * LOG2E)
        p = tl.exp2(s - lse2[None, :])  # [KEYS, ROWS]
        last_t = (i0 + ROWS - 1) // R
        _, full_hi = seen_keys(t0, t0 * 0, num_keys, MASK, CAUSAL, SPAN, STRIDE, MEMORY)
        full_lo, _ = seen_keys(last_t, t0 * 0, num_keys, MASK, CAUSAL, SPAN, STRIDE, MEMORY)
        at_edge = (s0 < full_lo) | (s0 + KEYS > full_hi)
        if ends_ptr is not None:
            at_edge = at_edge | (last_t >= first_end)
        if at_edge:
            first, end = seen_keys(t, t * 0, num_keys, MASK, CAUSAL, SPAN, STRIDE, MEMORY)
            seen = (offs_s[:, None] >= first[None, :]) & (offs_s[:, None] < end[None, :])
            if ends_ptr is not None:
                seen = seen & (t[None, :] < until[:, None])
            p = tl.where(seen, p, 0.0)
        if MASK == "bits":
            word = tl.load(word_row(words_ptr, bj, num_words, T, s0, SPAN) + t, mask=live, other=0)
            p = tl.where(has_bit(word[None, :], offs_s[:, None], SPAN), p, 0.0)
        dv = tl.dot(p.to(dout.dtype), dout, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(dout), input_precision=PRECISION)
        ds = (p * (dp - delta[None, :])).to(q[0].dtype)
        dk = add_product(dk, ds, q, PRECISION)
    partial_rows = ((split.to(tl.int64) * batch + b) * num_keys + offs_s) * J + j
    store_columns(dk_ptr, partial_rows, live_s, scale_columns(dk, scale), D, WIDTH)
    store_rows(dv_ptr, partial_rows, live_s, dv, DV, PADDED_DV)
