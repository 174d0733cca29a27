"""Importance (eq. 8-10) at chosen blocks, with gradients: what `use_diff_topk` lets the loss reach.

Selection block s overlaps compressed blocks (s - 1) * RATIO + 1 ... (s + 1) * RATIO - 1 at most
(RATIO = l'/d, l <= l'). The forward pass takes one token at a time and gathers these few keys for
each of its slots. So does the queries' gradient under "logit_mean"; that of probabilities passes
over all keys that a query sees (importance_gradients.py).
"""

from typing import Any, NamedTuple

import torch
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nsa.blocks import Starts
from nsa.config import NSAConfig
from nsa.documents import document_ends
from nsa.kernels.compressed import with_memory
from nsa.kernels.importance_gradients import (
    importance_dk_kernel,
    importance_dq_kernel,
    overlap,
)
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
    whole,
)
from nsa.kernels.registration import custom_op, register_autograd, register_fake
from nsa.kernels.tile_order.visible import document_start

LOWEST = tl.constexpr(-3.4028234663852886e38)  # the lowest finite float32


@jit
def importance_kernel(
    q_ptr, k_ptr, lse_ptr, starts_ptr, indices_ptr, value_ptr, dvalue_ptr, dq_ptr,
    T, num_keys, scale,
    H: tl.constexpr, G: tl.constexpr, J: tl.constexpr, D: tl.constexpr, N: tl.constexpr,
    SIZE: tl.constexpr, STRIDE: tl.constexpr, LENGTH: tl.constexpr,
    MEMORY: tl.constexpr, CAUSAL: tl.constexpr, LOGITS: tl.constexpr, BACKWARD: tl.constexpr,
    PADDED_D: tl.constexpr, HEADS: tl.constexpr, SLOTS: tl.constexpr, LANES: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """One token of one index head: its slots' values; backward, which is for logits alone, dQ and,
    into `value`, the gradient of a slot's weighted sum before any division."""
    R: tl.constexpr = H // J
    RATIO: tl.constexpr = LENGTH // STRIDE
    token, j = tl.program_id(0).to(tl.int64) // J, tl.program_id(0).to(tl.int64) % J
    b, t = token // T, token % T
    start = document_start(starts_ptr, b, t, T)
    r = tl.arange(0, HEADS)
    rows = token * H + j * R + r
    q = load_rows(q_ptr, rows, r < R, D, PADDED_D)  # [HEADS, PADDED_D]
    lse2 = load_lse2(lse_ptr, rows, r < R)
    lane = tl.arange(0, SLOTS * LANES) % LANES
    dq = tl.zeros([HEADS, PADDED_D], tl.float32)
    for n0 in range(0, N, SLOTS):
        n = n0 + tl.arange(0, SLOTS)
        slot = (token * J + j) * N + n
        column_n = n0 + tl.arange(0, SLOTS * LANES) // LANES
        column_slot = (token * J + j) * N + column_n
        block = tl.load(indices_ptr + column_slot, mask=column_n < N, other=-1)
        c = block * RATIO - (RATIO - 1) + lane
        seen = (block >= 0) & (c >= 0) & (c < num_keys - MEMORY) & (lane < 2 * RATIO - 1)
        if CAUSAL:
            seen = seen & (c * STRIDE + SIZE - 1 <= t)
        if starts_ptr is not None:
            seen = seen & (c * STRIDE >= start)
        key_rows = (b * num_keys + MEMORY + c) * G + j // (J // G)
        k = load_rows(k_ptr, key_rows, seen, D, PADDED_D)
        weight = tl.where(seen, overlap(c, block, SIZE, STRIDE, LENGTH), 0.0)
        total = tl.sum(tl.reshape(weight, [SLOTS, LANES]), 1)  # [SLOTS], in strides
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale  # [HEADS, SLOTS * LANES]
        p = s
        if not LOGITS:
            p = tl.exp2(s * LOG2E - lse2[:, None])
        p = tl.where(seen[None, :] & (r < R)[:, None], p, 0.0)
        if BACKWARD:
            dsum = tl.load(dvalue_ptr + slot, mask=n < N, other=0.0)
            dsum = dsum / (R * tl.where(total > 0, total, 1.0))
            tl.store(value_ptr + slot, dsum, mask=n < N)
            spread = tl.broadcast_to(dsum[:, None], [SLOTS, LANES])
            weight = weight * tl.reshape(spread, [SLOTS * LANES])
            ds = tl.broadcast_to(weight[None, :], [HEADS, SLOTS * LANES])
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


class Sizes(NamedTuple):
    """What the ops take after the tensors."""

    size: int  # l
    stride: int  # d
    length: int  # l'
    memory: int  # memory keys before the compressed ones
    causal: bool
    logits: bool  # the rule "logit_mean", not "probability_sum"


def constants_of(q: Tensor, keys: Tensor, indices: Tensor, sizes: Sizes) -> dict[str, Any]:
    """What every kernel here is compiled for, but for LOGITS and tile sizes."""
    (H, D), G, (J, N) = q.shape[2:], keys.shape[2], indices.shape[2:]
    return dict(
        H=H, G=G, J=J, D=D, N=N, SIZE=sizes.size, STRIDE=sizes.stride, LENGTH=sizes.length,
        MEMORY=sizes.memory, CAUSAL=sizes.causal, PADDED_D=padded(D), PRECISION=precision(),
    )  # fmt: skip


def launch(
    q: Tensor,
    keys: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    indices: Tensor,
    value: Tensor,
    sizes: Sizes,
    *,
    dvalue: Tensor | None = None,
    dq: Tensor | None = None,
) -> None:
    """importance_kernel, backward if there is a dvalue."""
    (B, T, H, D), J = q.shape, indices.shape[2]
    lanes = power_of_2(2 * (sizes.length // sizes.stride) - 1)
    columns = 64 if q.element_size() * padded(D) <= 512 else 32
    importance_kernel[(B * T * J,)](
        q, keys, lse, starts, indices, value, dvalue, dq, T, keys.shape[1], D**-0.5,
        **constants_of(q, keys, indices, sizes), LOGITS=sizes.logits,
        BACKWARD=dvalue is not None, HEADS=max(16, power_of_2(H // J)),
        SLOTS=max(1, columns // lanes), LANES=lanes, num_warps=4,
    )  # fmt: skip


@custom_op
def selected_importance_op(
    q: Tensor,
    keys: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    indices: Tensor,
    size: int,
    stride: int,
    length: int,
    memory: int,
    causal: bool,
    logits: bool,
) -> Tensor:
    """[B, T, J, N] float32; 0 in empty slots. `keys` are memory keys, then compressed ones."""
    value = torch.empty(indices.shape, dtype=torch.float32, device=q.device)
    with torch.cuda.device_of(q):
        sizes = Sizes(size, stride, length, memory, causal, logits)
        launch(q, keys, lse, starts, indices, value, sizes)
    return value


@custom_op
def selected_importance_backward_op(
    q: Tensor,
    keys: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    indices: Tensor,
    dvalue: Tensor,
    size: int,
    stride: int,
    length: int,
    memory: int,
    causal: bool,
    logits: bool,
) -> tuple[Tensor, Tensor]:
    """dq and dkeys, what reaches them through lse included."""
    sizes = Sizes(size, stride, length, memory, causal, logits)
    with torch.cuda.device_of(q):
        if logits:
            dq, dsum, sums = torch.empty_like(q), torch.empty_like(dvalue), (None, None)
            launch(q, keys, lse, starts, indices, dsum, sizes, dvalue=dvalue, dq=dq)
        else:
            dq, *sums = query_gradient(q, keys, lse, starts, indices, dvalue, sizes)
            dsum = dvalue
        ends = None if starts is None else document_ends(starts)
        return dq, key_gradient(q, keys, lse, ends, indices, dsum, sizes, *sums)


def query_gradient(
    q: Tensor,
    keys: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    indices: Tensor,
    dvalue: Tensor,
    sizes: Sizes,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, and the norm and the mean of each of its rows, of probabilities."""
    (B, T, H, D), J = q.shape, indices.shape[2]
    dq, norm, mean = torch.empty_like(q), torch.empty_like(lse), torch.empty_like(lse)
    heads = power_of_2(H // J)
    tokens = max(1, 32 // heads)
    importance_dq_kernel[(cdiv(T, tokens) * B * J,)](
        q, keys, lse, starts, indices, dvalue, dq, norm, mean, T, keys.shape[1], D**-0.5,
        **constants_of(q, keys, indices, sizes), TOKENS=tokens, HEADS=heads,
        KEYS=tile_keys(q), num_warps=4,
    )  # fmt: skip
    return dq, norm, mean


def key_gradient(
    q: Tensor,
    keys: Tensor,
    lse: Tensor,
    ends: Tensor | None,
    indices: Tensor,
    dsum: Tensor,
    sizes: Sizes,
    norm: Tensor | None,
    mean: Tensor | None,
) -> Tensor:
    """dkeys; logits have neither norm nor mean."""
    T, (B, K, G, D), tile = q.shape[1], keys.shape, tile_keys(q)
    dk = torch.empty_like(keys)
    importance_dk_kernel[(cdiv(K, tile) * B * G,)](
        q, keys, lse, norm, mean, ends, indices, dsum, dk, T, K, D**-0.5,
        **constants_of(q, keys, indices, sizes), LOGITS=sizes.logits,
        TOKENS=tile, KEYS=tile, num_warps=4,
    )  # fmt: skip
    return dk


def tile_keys(q: Tensor) -> int:
    """Keys that a tile of the gradients' kernels holds."""
    return 64 if q.element_size() * padded(q.shape[3]) <= 256 else 16


@register_fake(selected_importance_op)
def _(q, keys, lse, starts, indices, size, stride, length, memory, causal, logits):
    return q.new_empty(indices.shape, dtype=torch.float32)


@register_fake(selected_importance_backward_op)
def _(q, keys, lse, starts, indices, dvalue, size, stride, length, memory, causal, logits):
    return q.new_empty(q.shape), keys.new_empty(keys.shape)


def _save(ctx, inputs, output):
    *tensors, _, _, _, _, _, _ = inputs
    ctx.save_for_backward(*tensors)
    ctx.sizes = inputs[len(tensors) :]


def _backward(ctx, dvalue):
    grads = selected_importance_backward_op(*ctx.saved_tensors, dvalue.contiguous(), *ctx.sizes)
    return *grads, *[None] * (3 + len(ctx.sizes))


register_autograd(selected_importance_op, _backward, setup_context=_save)


def selected_importance(
    q: Float[Tensor, "B T H D"],
    k_cmp: Float[Tensor, "B C G D"],
    lse: Float[Tensor, "B T H"],
    block_indices: Int[Tensor, "B T J N"],
    cfg: NSAConfig,
    mem_k: Float[Tensor, "G Nm D"] | None = None,
    *,
    document_starts: Starts = None,
) -> Float[Tensor, "B T J N"]:
    """block_importance at block_indices, without the rest of it; 0 in empty slots.

    Differentiable in q, k_cmp and mem_k. What reaches them through lse is in their gradients, so
    lse itself receives none: it is taken to be that of `compressed_attention` over the same keys.
    """
    logits, memories = cfg.importance == "logit_mean", 0
    if mem_k is not None and not logits:  # a mean of logits knows no lse
        memories, k_cmp = mem_k.shape[1], with_memory(mem_k, k_cmp)
    q, k_cmp = operands(q, k_cmp)
    return selected_importance_op(
        q, k_cmp, lse.float().contiguous(), whole(document_starts),
        block_indices.int().contiguous(),
        cfg.compress_block_size, cfg.compress_block_sliding_stride,
        cfg.selection_block_size, memories, cfg.causal, logits,
    )  # fmt: skip
