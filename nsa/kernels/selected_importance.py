"""Importance (eq. 8-10) at chosen blocks, with gradients: what `use_diff_topk` lets the loss reach.

Selection block s overlaps compressed blocks (s - 1) * RATIO + 1 ... (s + 1) * RATIO - 1 at most
(RATIO = l'/d, l <= l'). Forward and dQ take one token at a time and gather these few keys for each
of its slots; dK takes a tile of keys and passes over the tokens that see it.
"""

import torch
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.jit import jit
from nsa.kernels.primitives import (
    LOG2E,
    cdiv,
    load_lse2,
    load_rows,
    operands,
    padded,
    power_of_2,
    precision,
    store_rows,
)
from nsa.kernels.registration import custom_op, register_autograd, register_fake

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite float32


@jit
def overlap(c, block, SIZE: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr):
    """Tokens shared by compressed block c and selection block `block`, in strides (eq. 9)."""
    begin = tl.maximum(c * STRIDE, block * LENGTH)
    end = tl.minimum(c * STRIDE + SIZE, (block + 1) * LENGTH)
    return tl.maximum(end - begin, 0).to(tl.float32) / STRIDE


@jit
def importance_kernel(
    q_ptr, k_ptr, lse_ptr, indices_ptr, value_ptr, dvalue_ptr, dq_ptr, dlse_ptr, T, C, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr,
    CAUSAL: tl.constexpr, LOGITS: tl.constexpr, BACKWARD: tl.constexpr,
    PADDED_D: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr, LANES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One token of one index head: its slots' values; backward, dQ, dlse and, into `value`, the
    gradient of a slot's weighted sum before any division."""
    R: tl.constexpr = H // J
    RATIO: tl.constexpr = LENGTH // STRIDE
    token, j = tl.program_id(0).to(tl.int64) // J, tl.program_id(0).to(tl.int64) % J
    b, t = token // T, token % T
    r = tl.arange(0, HEADS)
    rows = token * H + j * R + r
    q = load_rows(q_ptr, rows, r < R, D, PADDED_D)  # [HEADS, PADDED_D]
    lse2 = load_lse2(lse_ptr, rows, r < R)
    lane = tl.arange(0, SLOTS * LANES) % LANES
    dq = tl.zeros([HEADS, PADDED_D], tl.float32)
    dlse = tl.zeros([HEADS], tl.float32)
    for n0 in range(0, N, SLOTS):
        n = n0 + tl.arange(0, SLOTS)
        slot = (token * J + j) * N + n
        column_n = n0 + tl.arange(0, SLOTS * LANES) // LANES
        column_slot = (token * J + j) * N + column_n
        block = tl.load(indices_ptr + column_slot, mask=column_n < N, other=-1)
        c = block * RATIO - (RATIO - 1) + lane
        seen = (block >= 0) & (c >= 0) & (c < C) & (lane < 2 * RATIO - 1)
        if CAUSAL:
            seen = seen & (c * STRIDE + SIZE - 1 <= t)
        k = load_rows(k_ptr, (b * C + c) * G + j // (J // G), seen, D, PADDED_D)
        weight = tl.where(seen, overlap(c, block, SIZE, STRIDE, LENGTH), 0.0)
        total = tl.sum(tl.reshape(weight, [SLOTS, LANES]), 1)  # [SLOTS], in strides
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [HEADS, SLOTS * LANES]
        p = s
        if not LOGITS:
            p = tl.exp2(s * LOG2E - lse2[:, None])
        p = tl.where(seen[None, :] & (r < R)[:, None], p, 0.0)
        if BACKWARD:
            dsum = tl.load(dvalue_ptr + slot, mask=n < N, other=0.0)
            if LOGITS:
                dsum = dsum / (R * tl.where(total > 0, total, 1.0))
            tl.store(value_ptr + slot, dsum, mask=n < N)
            spread = tl.broadcast_to(dsum[:, None], [SLOTS, LANES])
            weight = weight * tl.reshape(spread, [SLOTS * LANES])
            if LOGITS:
                ds = tl.broadcast_to(weight[None, :], [HEADS, SLOTS * LANES])
            else:
                ds = p * weight[None, :]
                dlse -= tl.sum(ds, 1)
            dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
        else:
            value = tl.sum(tl.reshape(tl.sum(p, 0) * weight, [SLOTS, LANES]), 1)
            if LOGITS:
                value = value / (R * tl.where(total > 0, total, 1.0))
                value = tl.where(total > 0, value, LOWEST)
            kept = tl.load(indices_ptr + slot, mask=n < N, other=-1) >= 0
            tl.store(value_ptr + slot, tl.where(kept, value, 0.0), mask=n < N)
    if BACKWARD:
        store_rows(dq_ptr, rows, r < R, dq * scale, D, PADDED_D)
        tl.store(dlse_ptr + rows, dlse, mask=r < R)


@jit
def add_exactly(total, lost, x):
    """total + x, and what its rounding lost, to be made up for by the next addition (Kahan)."""
    x -= lost
    new = total + x
    return new, (new - total) - x


@jit
def importance_dk_kernel(
    q_ptr, k_ptr, lse_ptr, indices_ptr, dsum_ptr, dk_ptr, T, C, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr,
    CAUSAL: tl.constexpr, LOGITS: tl.constexpr,
    PADDED_D: tl.constexpr, TOKENS: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of KEYS compressed keys from every token that sees them.

    In float32 the tiles' sums are added exactly: one accumulator over all tokens and heads would
    round as often as there are rows, and err more than eager PyTorch, which sums in runs.
    """
    R: tl.constexpr = H // J
    num_tiles = tl.cdiv(C, KEYS)
    bg = (tl.program_id(0) // num_tiles).to(tl.int64)
    b, g = bg // G, bg % G
    c0 = tl.program_id(0) % num_tiles * KEYS
    c = c0 + tl.arange(0, KEYS)
    k = load_rows(k_ptr, (b * C + c) * G + g, c < C, D, PADDED_D)  # [KEYS, PADDED_D]
    block = c * STRIDE // LENGTH  # the first of at most two that it overlaps
    here = overlap(c, block, SIZE, STRIDE, LENGTH)[None, :]
    after = overlap(c, block + 1, SIZE, STRIDE, LENGTH)[None, :]
    t_lo = 0
    if CAUSAL:
        t_lo = c0 * STRIDE + SIZE - 1
    dk = tl.zeros([KEYS, PADDED_D], tl.float32)
    lost = tl.zeros([KEYS, PADDED_D], tl.float32)
    for t0 in range(t_lo, T, TOKENS):
        t = t0 + tl.arange(0, TOKENS)
        live = t < T
        seen = (c < C)[None, :] & live[:, None]
        if CAUSAL:
            seen = seen & ((c * STRIDE + SIZE - 1)[None, :] <= t[:, None])
        for jj in range(J // G):
            j = g * (J // G) + jj
            slots = ((b * T + t) * J + j) * N
            weight = tl.zeros([TOKENS, KEYS], tl.float32)
            for n in range(N):
                chosen = tl.load(indices_ptr + slots + n, mask=live, other=-1)[:, None]
                dsum = tl.load(dsum_ptr + slots + n, mask=live, other=0.0)[:, None]
                weight += tl.where(chosen == block[None, :], dsum * here, 0.0)
                next_one = (chosen == block[None, :] + 1) & (chosen > 0)
                weight += tl.where(next_one, dsum * after, 0.0)
            weight = tl.where(seen, weight, 0.0)
            for r in range(R):
                rows = (b * T + t) * H + j * R + r
                q = load_rows(q_ptr, rows, live, D, PADDED_D)  # [TOKENS, PADDED_D]
                ds = weight
                if not LOGITS:
                    s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (scale * LOG2E)
                    p = tl.exp2(s - load_lse2(lse_ptr, rows, live)[:, None])
                    ds = tl.where(seen, weight * p, 0.0)
                ds = tl.trans(ds).to(q.dtype)
                if q.dtype == tl.float32:
                    product = tl.dot(ds, q, input_precision=PRECISION)
                    dk, lost = add_exactly(dk, lost, product)
                else:
                    dk = tl.dot(ds, q, dk, input_precision=PRECISION)
    store_rows(dk_ptr, (b * C + c) * G + g, c < C, dk * scale, D, PADDED_D)


def launch(arrays, q: Tensor, k_cmp: Tensor, indices: Tensor, sizes, backward: bool) -> None:
    """importance_kernel on (value, dvalue, dq, dlse); sizes are (l, d, l', causal, logits)."""
    (B, T, H, D), (J, N) = q.shape, indices.shape[2:]
    size, stride, length, causal, logits = sizes
    lanes = power_of_2(2 * (length // stride) - 1)
    columns = 64 if q.element_size() * padded(D) <= 512 else 32
    importance_kernel[(B * T * J,)](
        *arrays, T, k_cmp.shape[1], D**-0.5,
        H=H, G=k_cmp.shape[2], J=J, D=D, N=N, SIZE=size, STRIDE=stride, LENGTH=length,
        CAUSAL=causal, LOGITS=logits, BACKWARD=backward, PADDED_D=padded(D),
        HEADS=max(16, power_of_2(H // J)), SLOTS=max(1, columns // lanes), LANES=lanes,
        PRECISION=precision(), num_warps=4,
    )  # fmt: skip


@custom_op
def selected_importance_op(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    indices: Tensor,
    size: int,
    stride: int,
    length: int,
    causal: bool,
    logits: bool,
) -> Tensor:
    """[B, T, J, N] float32; 0 in empty slots."""
    value = torch.empty(indices.shape, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        arrays = (q, k_cmp, lse, indices, value, None, None, None)
        launch(arrays, q, k_cmp, indices, (size, stride, length, causal, logits), False)
    return value


@custom_op
def selected_importance_backward_op(
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    indices: Tensor,
    dvalue: Tensor,
    size: int,
    stride: int,
    length: int,
    causal: bool,
    logits: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk_cmp, dlse."""
    (B, T, H, D), (_, C, G, _), (J, N) = q.shape, k_cmp.shape, indices.shape[2:]
    dsum = torch.empty(indices.shape, dtype=torch.float32, device=q.device)
    dq, dk, dlse = torch.empty_like(q), torch.empty_like(k_cmp), torch.empty_like(lse)
    keys = 64 if q.element_size() * padded(D) <= 256 else 16
    with torch.cuda.device_of(q):
        arrays = (q, k_cmp, lse, indices, dsum, dvalue, dq, dlse)
        launch(arrays, q, k_cmp, indices, (size, stride, length, causal, logits), True)
        importance_dk_kernel[(cdiv(C, keys) * B * G,)](
            q, k_cmp, lse, indices, dsum, dk, T, C, D**-0.5,
            H=H, G=G, J=J, D=D, N=N, SIZE=size, STRIDE=stride, LENGTH=length, CAUSAL=causal,
            LOGITS=logits, PADDED_D=padded(D), TOKENS=keys, KEYS=keys, PRECISION=precision(),
            num_warps=4,
        )  # fmt: skip
    return dq, dk, dlse


@register_fake(selected_importance_op)
def _(q, k_cmp, lse, indices, size, stride, length, causal, logits):
    return q.new_empty(indices.shape, dtype=torch.float32)


@register_fake(selected_importance_backward_op)
def _(q, k_cmp, lse, indices, dvalue, size, stride, length, causal, logits):
    return q.new_empty(q.shape), k_cmp.new_empty(k_cmp.shape), lse.new_empty(lse.shape)


def _save(ctx, inputs, output):
    q, k_cmp, lse, indices, *ctx.sizes = inputs
    ctx.save_for_backward(q, k_cmp, lse, indices)


def _backward(ctx, dvalue):
    grads = selected_importance_backward_op(*ctx.saved_tensors, dvalue.contiguous(), *ctx.sizes)
    return *grads, None, None, None, None, None, None


register_autograd(selected_importance_op, _backward, setup_context=_save)


def selected_importance(
    q: Float[Tensor, "B T H D"],
    k_cmp: Float[Tensor, "B C G D"],
    lse: Float[Tensor, "B T H"],
    block_indices: Int[Tensor, "B T J N"],
    cfg: NSAConfig,
) -> Float[Tensor, "B T J N"]:
    """block_importance at block_indices, without the rest of it; 0 in empty slots.

    Differentiable in q, k_cmp and lse.
    """
    q, k_cmp = operands(q, k_cmp)
    return selected_importance_op(
        q, k_cmp, lse.float().contiguous(), block_indices.int().contiguous(),
        cfg.compress_block_size, cfg.compress_block_sliding_stride,
        cfg.selection_block_size, cfg.causal, cfg.importance == "logit_mean",
    )  # fmt: skip
