"""φ of eq. 7 as attention pooling: scores, softmax and sum of a block's tokens in one kernel.

Token i of block c is y_i = x_{cd+i} + e_i. With scores s_i = W y_i + p_i and, in each channel,
a = softmax of s over the block, the block's key is Σ a_i y_i. Its gradient do gives

    ds_i = a_i do (y_i - Σ a_j y_j),    dy_i = a_i do + Wᵀ ds_i,

and those of W, p and e are sums of ds_i y_iᵀ, ds_i and dy_i over blocks. Windows are never stored:
the backward pass takes tokens, a stride of d at a time, each with every block that covers it.
"""

import torch
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from nsa import reference
from nsa.config import NSAConfig
from nsa.kernels.jit import jit
from nsa.kernels.primitives import (
    cdiv,
    load_rows,
    num_multiprocessors,
    operands,
    padded,
    power_of_2,
    precision,
    store_rows,
)
from nsa.kernels.registration import custom_op, register_autograd, register_fake

ROWS = 64  # tokens of a program's blocks, at least
LARGEST = 8192  # numbers of a block, padded: what a program holds
PROGRAMS = 2  # a multiprocessor, in the backward pass


@jit
def load_tokens(
    x_ptr, positions_ptr, rows, places, live,
    D: tl.constexpr, PADDED_D: tl.constexpr,
):  # fmt: skip
    """y: tokens that start at `rows`, plus the learned vectors of their places."""
    features = tl.arange(0, PADDED_D)[None, :]
    mask = live[:, None] & (features < D)
    y = tl.load(x_ptr + rows[:, None] + features, mask=mask, other=0.0)
    if positions_ptr is not None:
        at = positions_ptr + places[:, None] * D + features
        y += tl.load(at, mask=mask, other=0.0).to(y.dtype)
    return y


@jit
def load_weight(weight_ptr, dtype, D: tl.constexpr, PADDED_D: tl.constexpr):
    """W, to which a score is a row."""
    rows = tl.arange(0, PADDED_D)
    return load_rows(weight_ptr, rows, rows < D, D, PADDED_D).to(dtype)


@jit
def attention_pool_kernel(
    x_ptr, weight_ptr, scores_ptr, positions_ptr, out_ptr, lse_ptr, C, stride_b, stride_t, stride_g,
    G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """BLOCKS blocks of one head: their keys, and the log of each softmax's sum."""
    tiles = tl.cdiv(C, BLOCKS)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, g = (head // G).to(tl.int64), head % G
    row = tl.arange(0, BLOCKS * PADDED_SIZE)
    c, place = tile * BLOCKS + row // PADDED_SIZE, row % PADDED_SIZE
    live = (c < C) & (place < SIZE)
    if positions_ptr is not None:
        positions_ptr += g * SIZE * D
    rows = b * stride_b + (c * STRIDE + place).to(tl.int64) * stride_t + g * stride_g
    y = load_tokens(x_ptr, positions_ptr, rows, place, live, D, PADDED_D)
    weight = load_weight(weight_ptr, y.dtype, D, PADDED_D)
    scores = load_rows(scores_ptr, place, live, D, PADDED_D).to(tl.float32)
    scores += tl.dot(y, tl.trans(weight), input_precision=PRECISION)
    scores = tl.where((place < SIZE)[:, None], scores, float("-inf"))
    by_block = tl.reshape(scores, [BLOCKS, PADDED_SIZE, PADDED_D])
    most = tl.max(by_block, 1)
    weights = tl.exp(by_block - most[:, None, :])
    total = tl.sum(weights, 1)
    tokens = tl.reshape(y.to(tl.float32), [BLOCKS, PADDED_SIZE, PADDED_D])
    out = tl.sum(weights * tokens, 1) / total
    c = tile * BLOCKS + tl.arange(0, BLOCKS)
    key = (b * C + c) * G + g
    store_rows(out_ptr, key, c < C, out, D, PADDED_D)
    store_rows(lse_ptr, key, c < C, most + tl.log(total), D, PADDED_D)


@jit
def attention_pool_bwd_kernel(
    x_ptr, weight_ptr, scores_ptr, positions_ptr, out_ptr, lse_ptr, dout_ptr, dx_ptr, sums_ptr,
    B, T, C, stride_b, stride_t, stride_g,
    G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, SIZE: tl.constexpr,
    STRIDE: tl.constexpr, PADDED_STRIDE: tl.constexpr, OVER: tl.constexpr, CHUNKS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """CHUNKS strides of tokens of head g at a time: dX; and this program's sums for W, p and e.

    A row is a token and one of the blocks over it: the block that began `back` strides before.
    """
    part, parts, g = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    row = tl.arange(0, CHUNKS * OVER * PADDED_STRIDE)
    within, back = row % PADDED_STRIDE, row // PADDED_STRIDE % OVER
    place = back * STRIDE + within
    dtype = x_ptr.dtype.element_ty
    weight = load_weight(weight_ptr, dtype, D, PADDED_D)
    if positions_ptr is not None:
        positions_ptr += g * SIZE * D
    dweight = tl.zeros([PADDED_D, PADDED_D], tl.float32)
    dscores = tl.zeros([OVER * PADDED_STRIDE, PADDED_D], tl.float32)
    dpositions = tl.zeros([OVER * PADDED_STRIDE, PADDED_D], tl.float32)
    tiles = tl.cdiv(tl.cdiv(T, STRIDE), CHUNKS)
    for tile in range(part, B * tiles, parts):
        b = (tile // tiles).to(tl.int64)
        chunk = tile % tiles * CHUNKS + row // (PADDED_STRIDE * OVER)
        t, c = chunk * STRIDE + within, chunk - back
        live = (within < STRIDE) & (place < SIZE) & (t < T) & (c >= 0) & (c < C)
        rows = b * stride_b + t.to(tl.int64) * stride_t + g * stride_g
        y = load_tokens(x_ptr, positions_ptr, rows, place, live, D, PADDED_D)
        key = (b * C + c) * G + g
        dout = load_rows(dout_ptr, key, live, D, PADDED_D).to(tl.float32)
        out = load_rows(out_ptr, key, live, D, PADDED_D).to(tl.float32)
        scores = load_rows(scores_ptr, place, live, D, PADDED_D).to(tl.float32)
        scores += tl.dot(y, tl.trans(weight), input_precision=PRECISION)
        scores -= load_rows(lse_ptr, key, live, D, PADDED_D)
        dy = tl.where(live[:, None], tl.exp(scores), 0.0) * dout
        ds = dy * (y.to(tl.float32) - out)
        dy = tl.dot(ds.to(dtype), weight, dy, input_precision=PRECISION)
        dweight = tl.dot(tl.trans(ds.to(dtype)), y, dweight, input_precision=PRECISION)
        dscores += tl.sum(tl.reshape(ds, [CHUNKS, OVER * PADDED_STRIDE, PADDED_D]), 0)
        dpositions += tl.sum(tl.reshape(dy, [CHUNKS, OVER * PADDED_STRIDE, PADDED_D]), 0)
        by_block = tl.reshape(dy, [CHUNKS, OVER, PADDED_STRIDE, PADDED_D])
        dx = tl.reshape(tl.sum(by_block, 1), [CHUNKS * PADDED_STRIDE, PADDED_D])
        token = tl.arange(0, CHUNKS * PADDED_STRIDE)
        t = (tile % tiles * CHUNKS + token // PADDED_STRIDE) * STRIDE + token % PADDED_STRIDE
        live = (token % PADDED_STRIDE < STRIDE) & (t < T)
        store_rows(dx_ptr, (b * T + t) * G + g, live, dx, D, PADDED_D)
    # [parts, G, rows of W | rows of p | rows of e, D]
    sums_ptr += (part * G + g).to(tl.int64) * (D + 2 * SIZE) * D
    channel = tl.arange(0, PADDED_D)
    store_rows(sums_ptr, channel, channel < D, dweight, D, PADDED_D)
    row = tl.arange(0, OVER * PADDED_STRIDE)
    place = row // PADDED_STRIDE * STRIDE + row % PADDED_STRIDE
    live = (row % PADDED_STRIDE < STRIDE) & (place < SIZE)
    store_rows(sums_ptr + D * D, place, live, dscores, D, PADDED_D)
    store_rows(sums_ptr + (D + SIZE) * D, place, live, dpositions, D, PADDED_D)


def num_warps(width: int) -> int:
    return 8 if width > 64 else 4


@custom_op
def attention_pool_op(
    x: Tensor, weight: Tensor, scores: Tensor, positions: Tensor | None, stride: int
) -> tuple[Tensor, Tensor]:
    """Keys [B, C, G, D] of tokens [B, T, G, D], and what the softmaxes were divided by, as logs."""
    (B, T, G, D), size = x.shape, scores.shape[0]
    C, width = (T - size) // stride + 1, padded(D)
    out = torch.empty(B, C, G, D, dtype=x.dtype, device=x.device)
    lse = torch.empty(B, C, G, D, dtype=torch.float32, device=x.device)
    at_once = max(1, ROWS // power_of_2(size))
    with torch.cuda.device_of(x):
        attention_pool_kernel[(B * G * cdiv(C, at_once),)](
            x, weight, scores, positions, out, lse, C, *x.stride()[:3],
            G=G, D=D, PADDED_D=width, SIZE=size, PADDED_SIZE=power_of_2(size),
            STRIDE=stride, BLOCKS=at_once, PRECISION=precision(), num_warps=num_warps(width),
        )  # fmt: skip
    return out, lse


@custom_op
def attention_pool_backward_op(
    x: Tensor,
    weight: Tensor,
    scores: Tensor,
    positions: Tensor | None,
    out: Tensor,
    lse: Tensor,
    dout: Tensor,
    stride: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, of W and p, and of e [G, l, D], the last three in float32."""
    (B, T, G, D), C, size = x.shape, out.shape[1], scores.shape[0]
    dx = torch.empty(B, T, G, D, dtype=x.dtype, device=x.device)
    over, width = power_of_2(cdiv(size, stride)), padded(D)
    chunks = max(1, ROWS // (over * power_of_2(stride)))
    tiles = B * cdiv(cdiv(T, stride), chunks)
    parts = min(tiles, max(1, cdiv(PROGRAMS * num_multiprocessors(x.device), G)))
    sums = torch.empty(parts, G, D + 2 * size, D, dtype=torch.float32, device=x.device)
    with torch.cuda.device_of(x):
        attention_pool_bwd_kernel[(parts, G)](
            x, weight, scores, positions, out, lse, dout, dx, sums, B, T, C, *x.stride()[:3],
            G=G, D=D, PADDED_D=width, SIZE=size, STRIDE=stride, PADDED_STRIDE=power_of_2(stride),
            OVER=over, CHUNKS=chunks, PRECISION=precision(), num_warps=num_warps(width),
        )  # fmt: skip
    by_head = sums.sum(0)
    dweight, dscores = by_head[:, : D + size].sum(0).split([D, size])
    return dx, dweight.clone(), dscores.clone(), by_head[:, D + size :].clone()


@register_fake(attention_pool_op)
def _(x, weight, scores, positions, stride):
    B, T, G, D = x.shape
    out = x.new_empty(B, (T - scores.shape[0]) // stride + 1, G, D)
    return out, out.new_empty(out.shape, dtype=torch.float32)


@register_fake(attention_pool_backward_op)
def _(x, weight, scores, positions, out, lse, dout, stride):
    (G, D), size = x.shape[2:], scores.shape[0]
    shapes = (D, D), (size, D), (G, size, D)
    return x.new_empty(x.shape), *(lse.new_empty(shape) for shape in shapes)


def _save(ctx, inputs, output):
    *tensors, ctx.stride = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _):
    x, weight, scores, positions, out, lse = ctx.saved_tensors
    dx, *of_parameters = attention_pool_backward_op(
        x, weight, scores, positions, out, lse, dout.contiguous(), ctx.stride
    )
    dweight, dscores, dpositions = of_parameters
    return (
        dx,
        dweight.to(weight.dtype),
        dscores.to(scores.dtype),
        None if positions is None else dpositions.to(positions.dtype),
        None,
    )


register_autograd(attention_pool_op, _backward, setup_context=_save)


def attention_pool(
    x: Float[Tensor, "B T G D"],
    to_scores: Float[Tensor, "D D"],
    position_scores: Float[Tensor, "l D"],
    positions: Float[Tensor, "G l D"] | None,
    cfg: NSAConfig,
) -> Float[Tensor, "B C G D"]:
    """See `reference.attention_pool`, which blocks of more than LARGEST numbers go through."""
    if power_of_2(cfg.compress_block_size) * padded(x.shape[3]) > LARGEST:
        return reference.attention_pool(x, to_scores, position_scores, positions, cfg)
    x = x.to(operands(x[:0])[0].dtype)  # without a copy: heads may lie apart, features may not
    x = x if x.stride(3) == 1 else x.contiguous()
    positions = None if positions is None else positions.contiguous()
    stride = cfg.compress_block_sliding_stride
    return attention_pool_op(
        x, to_scores.contiguous(), position_scores.contiguous(), positions, stride
    )[0]
