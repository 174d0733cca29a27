"""The gradients of importance at chosen blocks, from one probability for each query and key.

With w the gradient of the chosen importances, spread to the compressed keys they are sums of, and
lse that of the scores s of every key a query sees, memory keys included:

    ds = p (w - D),   D = sum(p w),   p = exp(s - lse) / sum(exp(s - lse))

A confident query's p is near 1 at one key, where w and D cancel. They do so only if both come from
the same p: another kernel's rounds otherwise, by 1e-4 at scores of 1,000. So the dQ kernel sums
p w, p and their products with the keys in one pass, and the dK kernel takes D and the sum of
exponents from it. That sum is 1 up to the rounding of lse.
"""

import triton.language as tl

from nsa.kernels.jit import jit
from nsa.kernels.primitives import LOG2E, load_lse2, load_rows, store_rows
from nsa.kernels.tile_order.visible import (
    document_end,
    document_start,
    key_range,
    leap,
    seeing_tokens,
    seen_keys,
    sees,
)


@jit
def overlap(c, block, SIZE: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr):
    """Tokens shared by compressed block c and selection block `block`, in strides (eq. 9)."""
    begin = tl.maximum(c * STRIDE, block * LENGTH)
    end = tl.minimum(c * STRIDE + SIZE, (block + 1) * LENGTH)
    return tl.maximum(end - begin, 0).to(tl.float32) / STRIDE


@jit
def spread(
    indices_ptr, dsum_ptr, slots, live, c,
    N: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr,
):  # fmt: skip
    """The slots' gradients as those of compressed blocks c; 0 for c < 0.  [tokens, keys]"""
    block = tl.maximum(c, 0) * STRIDE // LENGTH  # the first of at most two that c overlaps
    here = tl.where(c >= 0, overlap(c, block, SIZE, STRIDE, LENGTH), 0.0)[None, :]
    after = tl.where(c >= 0, overlap(c, block + 1, SIZE, STRIDE, LENGTH), 0.0)[None, :]
    weight = tl.zeros([slots.shape[0], c.shape[0]], tl.float32)
    for n in range(N):
        chosen = tl.load(indices_ptr + slots + n, mask=live, other=-1)[:, None]
        dsum = tl.load(dsum_ptr + slots + n, mask=live, other=0.0)[:, None]
        weight += tl.where(chosen == block[None, :], dsum * here, 0.0)
        weight += tl.where(chosen == block[None, :] + 1, dsum * after, 0.0)
    return weight


@jit
def importance_dq_kernel(
    q_ptr, k_ptr, lse_ptr, starts_ptr, indices_ptr, dvalue_ptr, dq_ptr, norm_ptr, mean_ptr,
    T, num_keys, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr,
    MEMORY: tl.constexpr, CAUSAL: tl.constexpr, PADDED_D: tl.constexpr,
    TOKENS: tl.constexpr, HEADS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of TOKENS queries of an index head's R heads.

    Also each one's sum of exponents (`norm`) and D (`mean`), which importance_dk_kernel reads.
    """
    R: tl.constexpr = H // J
    ROWS: tl.constexpr = TOKENS * HEADS
    num_tiles = tl.cdiv(T, TOKENS)
    t0 = (num_tiles - 1 - tl.program_id(0) % num_tiles) * TOKENS  # the longest first
    bj = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, j = bj // J, bj % J
    t = t0 + tl.arange(0, TOKENS)
    slots = ((b * T + t) * J + j) * N
    i = tl.arange(0, ROWS)
    row_t, r = t0 + i // HEADS, i % HEADS
    live = (row_t < T) & (r < R)
    rows = (b * T + row_t) * H + j * R + r
    q = load_rows(q_ptr, rows, live, D, PADDED_D)  # [ROWS, PADDED_D]
    lse2 = load_lse2(lse_ptr, rows, live)
    starts = document_start(starts_ptr, b, row_t, T)
    first, end = seen_keys(row_t, starts, num_keys, "prefix", CAUSAL, SIZE, STRIDE, MEMORY)
    start = document_start(starts_ptr, b, t0, T)
    s_lo, _ = seen_keys(t0, start, num_keys, "prefix", CAUSAL, SIZE, STRIDE, MEMORY)
    last = tl.minimum(t0 + TOKENS, T) - 1
    _, s_hi = seen_keys(last, start, num_keys, "prefix", CAUSAL, SIZE, STRIDE, MEMORY)
    DOCUMENTS: tl.constexpr = starts_ptr is not None
    s_lo, s_hi, distance = key_range(s_lo, s_hi, "prefix", MEMORY, KEYS, DOCUMENTS)

    norm = tl.zeros([ROWS], tl.float32)
    pw_sum = tl.zeros([ROWS], tl.float32)
    pk_sum = tl.zeros([ROWS, PADDED_D], tl.float32)
    pwk_sum = tl.zeros([ROWS, PADDED_D], tl.float32)
    for s0 in range(s_lo, s_hi, KEYS):
        s0 = leap(s0, distance, MEMORY, KEYS, DOCUMENTS)
        offs_s = s0 + tl.arange(0, KEYS)
        key_rows = (b * num_keys + offs_s) * G + j // (J // G)
        k = load_rows(k_ptr, key_rows, offs_s < num_keys, D, PADDED_D)  # [KEYS, PADDED_D]
        w = spread(indices_ptr, dvalue_ptr, slots, t < T, offs_s - MEMORY, N, SIZE, STRIDE, LENGTH)
        w = tl.broadcast_to(w[:, None, :], [TOKENS, HEADS, KEYS])
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
        p = tl.exp2(s - lse2[:, None])  # [ROWS, KEYS]
        p = tl.where(sees(offs_s[None, :], first[:, None], end[:, None], MEMORY), p, 0.0)
        pw = p * tl.reshape(w, [ROWS, KEYS])
        norm += tl.sum(p, 1)
        pw_sum += tl.sum(pw, 1)
        pk_sum = tl.dot(p.to(k.dtype), k, pk_sum, input_precision=PRECISION)
        pwk_sum = tl.dot(pw.to(k.dtype), k, pwk_sum, input_precision=PRECISION)
    norm = tl.where(norm > 0, norm, 1.0)  # a row that saw nothing
    mean = pw_sum / norm
    dq = (pwk_sum - mean[:, None] * pk_sum) * (scale / norm[:, None])
    store_rows(dq_ptr, rows, live, dq, D, PADDED_D)
    tl.store(norm_ptr + rows, norm, mask=live)
    tl.store(mean_ptr + rows, mean, mask=live)


@jit
def add_exactly(total, lost, x):
    """total + x, and what its rounding lost, to be made up for by the next addition (Kahan)."""
    x -= lost
    new = total + x
    return new, (new - total) - x


@jit
def importance_dk_kernel(
    q_ptr, k_ptr, lse_ptr, norm_ptr, mean_ptr, ends_ptr, indices_ptr, dsum_ptr, dk_ptr,
    T, num_keys, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr,
    MEMORY: tl.constexpr, CAUSAL: tl.constexpr, LOGITS: tl.constexpr,
    PADDED_D: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of KEYS keys from every token that sees them.

    In float32 the tiles' sums are added exactly: one accumulator over all tokens and heads would
    round as often as there are rows, and err more than eager PyTorch, which sums in runs.
    """
    R: tl.constexpr = H // J
    num_tiles = tl.cdiv(num_keys, KEYS)
    bg = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, g = bg // G, bg % G
    s0 = tl.program_id(0) % num_tiles * KEYS
    offs_s = s0 + tl.arange(0, KEYS)
    key_rows = (b * num_keys + offs_s) * G + g
    k = load_rows(k_ptr, key_rows, offs_s < num_keys, D, PADDED_D)  # [KEYS, PADDED_D]
    t_lo, t_hi = seeing_tokens(s0, s0, T, "prefix", CAUSAL, SIZE, STRIDE, MEMORY)
    until = document_end(ends_ptr, b, offs_s, offs_s < num_keys, T, "prefix", STRIDE, MEMORY)
    if ends_ptr is not None:
        t_hi = tl.minimum(t_hi, tl.max(tl.where(offs_s < num_keys, until, 0), 0))
    dk = tl.zeros([KEYS, PADDED_D], tl.float32)
    lost = tl.zeros([KEYS, PADDED_D], tl.float32)
    for t0 in range(t_lo, t_hi, TOKENS):
        t = t0 + tl.arange(0, TOKENS)
        live = t < T
        _first, end = seen_keys(t, t * 0, num_keys, "prefix", CAUSAL, SIZE, STRIDE, MEMORY)
        seen = (offs_s[None, :] < end[:, None]) & live[:, None]
        if ends_ptr is not None:
            seen = seen & (t[:, None] < until[None, :])
        for jj in range(J // G):
            j = g * (J // G) + jj
            slots = ((b * T + t) * J + j) * N
            w = spread(indices_ptr, dsum_ptr, slots, live, offs_s - MEMORY, N, SIZE, STRIDE, LENGTH)
            for r in range(R):
                rows = (b * T + t) * H + j * R + r
                q = load_rows(q_ptr, rows, live, D, PADDED_D)  # [TOKENS, PADDED_D]
                ds = tl.where(seen, w, 0.0)
                if not LOGITS:
                    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
                    p = tl.exp2(s - load_lse2(lse_ptr, rows, live)[:, None])
                    norm = tl.load(norm_ptr + rows, mask=live, other=1.0)
                    mean = tl.load(mean_ptr + rows, mask=live, other=0.0)
                    ds = tl.where(seen, p / norm[:, None], 0.0) * (w - mean[:, None])
                ds = tl.trans(ds).to(q.dtype)
                if q.dtype == tl.float32:
                    product = tl.dot(ds, q, input_precision=PRECISION)
                    dk, lost = add_exactly(dk, lost, product)
                else:
                    dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    store_rows(dk_ptr, key_rows, offs_s < num_keys, dk * scale, D, PADDED_D)
