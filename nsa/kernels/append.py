"""What comes before decode attention: one new token of each sequence enters the cache.

One launch rotates the token, writes it to its places, and gathers the tokens of the compressed
block that may end with it; a second one stores that block, if it does end, once φ has folded it.
"""

# pyright: reportCallIssue=false

from collections.abc import Sequence

import torch
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.jit import jit
from nsa.kernels.primitives import load_rows, padded, power_of_2, store_rows


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
def remember_raw(
    x_ptr, tail_ptr, out_ptr, x_row, b, g, t,
    G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDED_SIZE: tl.constexpr,
):  # fmt: skip
    """A token into the ring of the last SIZE, and the tokens of the next block out of it."""
    d = tl.arange(0, PADDED_D)
    new = tl.load(x_ptr + x_row + d, mask=d < D, other=0.0)
    i = tl.arange(0, PADDED_SIZE)
    token = next_block(t, SIZE, STRIDE) * STRIDE + i
    held = (i < SIZE) & (token < t)
    old = load_rows(tail_ptr, (b * SIZE + token % SIZE) * G + g, held, D, PADDED_D)
    block = tl.where((token == t)[:, None], new[None, :], old)
    store_rows(out_ptr, (b * SIZE + i) * G + g, i < SIZE, block, D, PADDED_D)
    tl.store(tail_ptr + ((b * SIZE + t % SIZE) * G + g) * D + d, new, mask=d < D)


@jit
def append_kernel(
    q_ptr, k_cmp_ptr, v_cmp_ptr, k_slc_ptr, v_slc_ptr, k_win_ptr, v_win_ptr,
    frequencies_ptr, lengths_ptr, q_rot_ptr,
    cache_k_slc_ptr, cache_v_slc_ptr, cache_k_win_ptr, cache_v_win_ptr, tail_k_ptr, tail_v_ptr,
    block_k_ptr, block_v_ptr, K, stride_b,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr,
    HALF: tl.constexpr, PADDED_HALF: tl.constexpr, ROWS: tl.constexpr, WINDOW: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, PADDED_SIZE: tl.constexpr,
    SELECTS: tl.constexpr, VALUES: tl.constexpr,
):  # fmt: skip
    """One sequence's new token, one key head and its query heads."""
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    t = tl.load(lengths_ptr + b)
    i = tl.arange(0, PADDED_HALF)[None, :]
    angle = t.to(tl.float32) * tl.load(frequencies_ptr + i, mask=i < HALF, other=0.0)
    cos, sin = tl.cos(angle), tl.sin(angle)

    r = tl.arange(0, ROWS)
    heads = (b * H + g * (H // G) + r) * D
    turn_rows(q_ptr, q_rot_ptr, heads, heads, r < H // G, cos, sin, HALF, PADDED_HALF)

    x_row = b * stride_b + g * D
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
    remember_raw(
        k_cmp_ptr, tail_k_ptr, block_k_ptr, x_row, b, g, t,
        G, D, PADDED_D, SIZE, STRIDE, PADDED_SIZE,
    )  # fmt: skip
    if VALUES:
        remember_raw(
            v_cmp_ptr, tail_v_ptr, block_v_ptr, x_row, b, g, t,
            G, D, PADDED_D, SIZE, STRIDE, PADDED_SIZE,
        )  # fmt: skip


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
    selected: Sequence[Tensor],
    window: Sequence[Tensor],
    tail: Sequence[Tensor],
    cfg: NSAConfig,
) -> tuple[Float[Tensor, "B 1 H D"], list[Float[Tensor, "B l G D"]]]:
    """Token number `lengths` of each sequence enters the parts of a cache that hold tokens.

    `new` are k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, not rotated. Returns rotated queries, and
    the keys (and values, where `tail` has them) of the next compressed block.
    """
    (B, _, H, D), G = q.shape, new[0].shape[2]
    strides = {x.stride() for x in new}
    if len(strides) > 1 or new[0].stride()[2:] != (D, 1):
        new = [x.contiguous() for x in new]
    size, values = cfg.compress_block_size, len(tail) > 1
    q, q_rot = q.contiguous(), torch.empty(B, 1, H, D, dtype=q.dtype, device=q.device)
    block = [torch.empty(B, size, G, D, dtype=q.dtype, device=q.device) for _ in tail]
    with torch.cuda.device_of(q):
        append_kernel[(B, G)](
            q, *new, frequencies, lengths, q_rot, *selected, *window, tail[0], tail[-1],
            block[0], block[-1], selected[0].shape[1], new[0].stride(0),
            H=H, G=G, D=D, PADDED_D=padded(D), HALF=D // 2, PADDED_HALF=power_of_2(D // 2),
            ROWS=power_of_2(H // G), WINDOW=window[0].shape[1], SIZE=size,
            STRIDE=cfg.compress_block_sliding_stride, PADDED_SIZE=power_of_2(size),
            SELECTS=cfg.num_selected_blocks > 0, VALUES=values, num_warps=4,
        )  # fmt: skip
    return q_rot, block


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
