"""What comes before decode attention: one new token of each sequence enters the cache.

One launch rotates the token, writes it to its places, and folds the compressed block that ends with
it, where φ is a weighted mean. For any other φ it gathers the block's tokens, and a second launch
stores what φ made of them.
"""

# pyright: reportCallIssue=false

from collections.abc import Mapping, Sequence

import torch
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.jit import jit
from nsa.kernels.primitives import LOG2E, load_rows, padded, power_of_2, precision, store_rows


@jit
def next_block(t, SIZE: tl.constexpr, STRIDE: tl.constexpr):
    """The first compressed block that has not ended before token t."""
    return tl.maximum(t - SIZE + STRIDE, 0) // STRIDE


@jit
def turn_rows(
    x_ptr, out_ptr, x_rows, out_rows, live, cos, sin, HALF: tl.constexpr, PADDED: tl.constexpr
):
    """Rows turned by one token's angles: offsets of their first numbers in, and out."""
    i = tl.arange(0, PADDED)[None, :]
    mask = live[:, None] & (i < HALF)
    first = tl.load(x_ptr + x_rows[:, None] + i, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + x_rows[:, None] + HALF + i, mask=mask, other=0.0).to(tl.float32)
    dtype = out_ptr.dtype.element_ty
    out = out_ptr + out_rows[:, None] + i
    tl.store(out, (first * cos - second * sin).to(dtype), mask=mask)
    tl.store(out + HALF, (second * cos + first * sin).to(dtype), mask=mask)


@jit
def next_block_tokens(
    x_ptr, tail_ptr, x_row, b, g, t,
    G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDED_SIZE: tl.constexpr,
):  # fmt: skip
    """The tokens of the next block [PADDED_SIZE, PADDED_D]; the new one enters the ring."""
    d = tl.arange(0, PADDED_D)
    new = tl.load(x_ptr + x_row + d, mask=d < D, other=0.0)
    i = tl.arange(0, PADDED_SIZE)
    token = next_block(t, SIZE, STRIDE) * STRIDE + i
    held = (i < SIZE) & (token < t)
    old = load_rows(tail_ptr, (b * SIZE + token % SIZE) * G + g, held, D, PADDED_D)
    tl.store(tail_ptr + ((b * SIZE + t % SIZE) * G + g) * D + d, new, mask=d < D)
    return tl.where((token == t)[:, None], new[None, :], old)


@jit
def weighted_mean(
    block, places_ptr, weight_ptr, place_scores_ptr, g,
    D: tl.constexpr, PADDED_D: tl.constexpr, SIZE: tl.constexpr, PADDED_SIZE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """φ as `MeanPool` or, where there are weights of scores, `AttentionPool` has it.  [PADDED_D]"""
    i = tl.arange(0, PADDED_SIZE)
    inside = i < SIZE
    x = block
    if places_ptr is not None:
        places = load_rows(places_ptr, g * SIZE + i, inside, D, PADDED_D)
        x = (x.to(tl.float32) + places.to(tl.float32)).to(block.dtype)
    share = tl.full([PADDED_SIZE, PADDED_D], 1.0 / SIZE, tl.float32)
    if weight_ptr is not None:
        d = tl.arange(0, PADDED_D)
        weight = load_rows(weight_ptr, d, d < D, D, PADDED_D).to(x.dtype)  # [to, from]
        scores = tl.dot(x, tl.trans(weight), input_precision=PRECISION)
        scores += load_rows(place_scores_ptr, i, inside, D, PADDED_D).to(tl.float32)
        scores = tl.where(inside[:, None], scores, float("-inf"))
        share = tl.exp2((scores - tl.max(scores, 0)[None, :]) * LOG2E)
        share = share / tl.sum(share, 0)[None, :]
    return tl.sum(tl.where(inside[:, None], x.to(tl.float32) * share, 0.0), 0)


@jit
def fold_next_block(
    x_ptr, tail_ptr, out_ptr, places_ptr, weight_ptr, place_scores_ptr, x_row, b, g, t, C,
    G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDED_SIZE: tl.constexpr,
    POOLS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A token enters the ring of raw ones. Its block, if it ends: folded into the cache, or as is.

    `out` is the part of compressed keys or values, or, if not POOLS, the tokens of the next block.
    """
    block = next_block_tokens(
        x_ptr, tail_ptr, x_row, b, g, t, G, D, PADDED_D, SIZE, STRIDE, PADDED_SIZE
    )
    if POOLS:
        c = next_block(t, SIZE, STRIDE)
        if c * STRIDE + SIZE == t + 1:
            folded = weighted_mean(
                block, places_ptr, weight_ptr, place_scores_ptr, g,
                D, PADDED_D, SIZE, PADDED_SIZE, PRECISION,
            )  # fmt: skip
            d = tl.arange(0, PADDED_D)
            out = out_ptr + ((b * C + c) * G + g) * D + d
            tl.store(out, folded.to(out_ptr.dtype.element_ty), mask=d < D)
    else:
        i = tl.arange(0, PADDED_SIZE)
        store_rows(out_ptr, (b * SIZE + i) * G + g, i < SIZE, block, D, PADDED_D)


@jit
def append_kernel(
    q_ptr, k_cmp_ptr, v_cmp_ptr, k_slc_ptr, v_slc_ptr, k_win_ptr, v_win_ptr,
    frequencies_ptr, lengths_ptr, q_rot_ptr,
    cache_k_slc_ptr, cache_v_slc_ptr, cache_k_win_ptr, cache_v_win_ptr, tail_k_ptr, tail_v_ptr,
    block_k_ptr, block_v_ptr,
    places_k_ptr, weight_k_ptr, place_scores_k_ptr, places_v_ptr, weight_v_ptr, place_scores_v_ptr,
    K, C, stride_b,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    HALF: tl.constexpr, PADDED_HALF: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDED_SIZE: tl.constexpr,
    SELECTS: tl.constexpr, POOLS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One sequence's new token and one key head: what turns, or the raw key, or the raw value."""
    b, g, task = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    t = tl.load(lengths_ptr + b)
    x_row = b * stride_b + g * D
    if task == 0:
        append_turned(
            q_ptr, k_slc_ptr, v_slc_ptr, k_win_ptr, v_win_ptr, frequencies_ptr, q_rot_ptr,
            cache_k_slc_ptr, cache_v_slc_ptr, cache_k_win_ptr, cache_v_win_ptr,
            x_row, b, g, t, K, H, G, D, PADDED_D, HALF, PADDED_HALF, ROWS, WINDOW, SELECTS,
        )  # fmt: skip
    elif task == 1:
        fold_next_block(
            k_cmp_ptr, tail_k_ptr, block_k_ptr, places_k_ptr, weight_k_ptr, place_scores_k_ptr,
            x_row, b, g, t, C, G, D, PADDED_D, SIZE, STRIDE, PADDED_SIZE, POOLS, PRECISION,
        )  # fmt: skip
    else:
        fold_next_block(
            v_cmp_ptr, tail_v_ptr, block_v_ptr, places_v_ptr, weight_v_ptr, place_scores_v_ptr,
            x_row, b, g, t, C, G, D, PADDED_D, SIZE, STRIDE, PADDED_SIZE, POOLS, PRECISION,
        )  # fmt: skip


@jit
def append_turned(
    q_ptr, k_slc_ptr, v_slc_ptr, k_win_ptr, v_win_ptr, frequencies_ptr, q_rot_ptr,
    cache_k_slc_ptr, cache_v_slc_ptr, cache_k_win_ptr, cache_v_win_ptr, x_row, b, g, t, K,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    HALF: tl.constexpr, PADDED_HALF: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr,
    SELECTS: tl.constexpr,
):  # fmt: skip
    """Queries turned; keys turned, and values, into the selected part and into the window."""
    i = tl.arange(0, PADDED_HALF)[None, :]
    angle = t.to(tl.float32) * tl.load(frequencies_ptr + i, mask=i < HALF, other=0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)
    r = tl.arange(0, ROWS)
    heads = (b * H + g * (H // G) + r) * D
    turn_rows(q_ptr, q_rot_ptr, heads, heads, r < H // G, cos, sin, HALF, PADDED_HALF)
    d = tl.arange(0, PADDED_D)
    one, only = tl.arange(0, 1), tl.arange(0, 1) == 0
    if SELECTS:
        place = ((b * K + t) * G + g) * D
        turn_rows(
            k_slc_ptr, cache_k_slc_ptr, x_row + one, place + one, only, cos, sin, HALF, PADDED_HALF
        )
        value = tl.load(v_slc_ptr + x_row + d, mask=d < D, other=0.0)
        tl.store(cache_v_slc_ptr + place + d, value, mask=d < D)
    slot = ((b * WINDOW + t % WINDOW) * G + g) * D
    turn_rows(
        k_win_ptr, cache_k_win_ptr, x_row + one, slot + one, only, cos, sin, HALF, PADDED_HALF
    )
    value = tl.load(v_win_ptr + x_row + d, mask=d < D, other=0.0)
    tl.store(cache_v_win_ptr + slot + d, value, mask=d < D)


@jit
def store_block_kernel(
    k_ptr, v_ptr, cache_k_ptr, cache_v_ptr, lengths_ptr, C,
    G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """One sequence's next compressed block into its place, if its last token has come."""
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = tl.load(lengths_ptr + b)
    c = next_block(t, SIZE, STRIDE)
    d = tl.arange(0, PADDED_D)
    mask = (d < D) & (c * STRIDE + SIZE == t + 1)
    row, place = (b * G + g) * D + d, ((b * C + c) * G + g) * D + d
    tl.store(cache_k_ptr + place, tl.load(k_ptr + row, mask=mask, other=0.0), mask=mask)
    if VALUES:
        tl.store(cache_v_ptr + place, tl.load(v_ptr + row, mask=mask, other=0.0), mask=mask)


def append_token(
    q: Float[Tensor, "B 1 H D"],
    new: Sequence[Float[Tensor, "B 1 G D"]],
    frequencies: Float[Tensor, " half"],
    lengths: Int[Tensor, " B"],
    parts: Mapping[str, Sequence[Tensor]],
    cfg: NSAConfig,
    pools: Sequence[Sequence[Tensor | None]] = (),
) -> tuple[Float[Tensor, "B 1 H D"], list[Float[Tensor, "B l G D"]]]:
    """Token number `lengths` of each sequence enters a cache.

    Args:
        new: k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, not rotated.
        parts: of the cache, by the names of `nsa.cache`.
        pools: `BlockCompressor.pooling` of keys, and of values where the cache has compressed ones;
            the next block, if it ends, then enters the cache too.

    Returns:
        Rotated queries, and the keys (and values) of the next compressed block, raw: none where
        `pools` has folded them.
    """
    (B, _, H, D), G = q.shape, new[0].shape[2]
    strides = {x.stride() for x in new}
    if len(strides) > 1 or new[0].stride()[2:] != (D, 1):
        new = [x.contiguous() for x in new]
    size, tail, compressed = cfg.compress_block_size, parts["tail"], parts["compressed"]
    q, q_rot = q.contiguous(), torch.empty(B, 1, H, D, dtype=q.dtype, device=q.device)
    out = compressed if pools else [q.new_empty(B, size, G, D) for _ in tail]
    weights = [
        None if x is None else x.contiguous() for pool in pools or [[None] * 3] for x in pool
    ]
    with torch.cuda.device_of(q):
        append_kernel[(B, G, 1 + len(tail))](
            q, *new, frequencies, lengths, q_rot, *parts["selected"], *parts["window"],
            tail[0], tail[-1], out[0], out[-1], *weights[:3], *weights[-3:],
            parts["selected"][0].shape[1], compressed[0].shape[1], new[0].stride(0),
            H=H, G=G, D=D, PADDED_D=padded(D), HALF=D // 2, PADDED_HALF=power_of_2(D // 2),
            ROWS=power_of_2(H // G), WINDOW=parts["window"][0].shape[1], SIZE=size,
            STRIDE=cfg.compress_block_sliding_stride, PADDED_SIZE=padded(size),
            SELECTS=cfg.num_selected_blocks > 0, POOLS=bool(pools), PRECISION=precision(),
            num_warps=4,
        )  # fmt: skip
    return q_rot, [] if pools else list(out)


def append_block(
    block: Sequence[Float[Tensor, "B 1 G D"]],
    compressed: Sequence[Float[Tensor, "B C G D"]],
    lengths: Int[Tensor, " B"],
    cfg: NSAConfig,
) -> None:
    """What φ made of the next block's keys (and values) enters the cache, if it has ended."""
    k, D = block[0], block[0].shape[3]
    block = [x.contiguous() for x in block]
    with torch.cuda.device_of(k):
        store_block_kernel[(k.shape[0], k.shape[2])](
            block[0], block[-1], compressed[0], compressed[-1], lengths, compressed[0].shape[1],
            G=k.shape[2], D=D, PADDED_D=padded(D), SIZE=cfg.compress_block_size,
            STRIDE=cfg.compress_block_sliding_stride, VALUES=len(compressed) > 1, num_warps=1,
        )  # fmt: skip
