"""φ of eq. 7 as attention pooling: scores, softmax and sum of a block's tokens in one kernel.

Token i of block c is y_i = x_{cd+i} + e_i. With scores s_i = W y_i + p_i and, in each channel,
a = softmax of s over the block, the block's key is Σ a_i y_i. Its gradient do gives

    ds_i = a_i do (y_i - Σ a_j y_j),    dy_i = a_i do + Wᵀ ds_i,

and those of W, p and e are sums of ds_i y_iᵀ, ds_i and dy_i over blocks. Windows are never stored.
Of the backward pass, one kernel takes tokens, each with every block over it, for dX; another takes
blocks for the parameters, in partial sums that are added in a fixed order.
"""

import torch
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from nsa import pooling
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

NUMBERS = 4096  # of the tokens that a program holds at once, or a whole block
LARGEST = 8192  # numbers of a block, padded: what a program holds
HEAVIEST = 2**17  # bytes of W, padded
PROGRAMS = 2  # a multiprocessor, that share the parameters' gradients


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
def score(
    y, weight, scores_ptr, place, live,
    D: tl.constexpr, PADDED_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """s: W y and the scores of the places."""
    of_place = load_rows(scores_ptr, place, live, D, PADDED_D).to(tl.float32)
    return tl.dot(y, tl.trans(weight), of_place, input_precision=PRECISION)


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
    scores = score(y, weight, scores_ptr, place, live, D, PADDED_D, PRECISION)
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
def score_gradients(
    y, weight, scores_ptr, place, out_ptr, lse_ptr, dout_ptr, key, live,
    D: tl.constexpr, PADDED_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """a do and ds of tokens y at places of the blocks whose rows are `key`; 0 where not live."""
    scores = score(y, weight, scores_ptr, place, live, D, PADDED_D, PRECISION)
    scores -= load_rows(lse_ptr, key, live, D, PADDED_D)
    dout = load_rows(dout_ptr, key, live, D, PADDED_D).to(tl.float32)
    out = load_rows(out_ptr, key, live, D, PADDED_D).to(tl.float32)
    weighed = tl.where(live[:, None], tl.exp(scores), 0.0) * dout
    return weighed, weighed * (y.to(tl.float32) - out)


@jit
def attention_pool_dx_kernel(
    x_ptr, weight_ptr, scores_ptr, positions_ptr, out_ptr, lse_ptr, dout_ptr, dx_ptr, T, C,
    stride_b, stride_t, stride_g,
    G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, SIZE: tl.constexpr,
    STRIDE: tl.constexpr, ROWS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one head: dX, from each block over them."""
    tiles = tl.cdiv(T, ROWS)
    tile, head = tl.program_id(0) % tiles, tl.program_id(0) // tiles
    b, g = (head // G).to(tl.int64), head % G
    t = tile * ROWS + tl.arange(0, ROWS)
    rows = b * stride_b + t.to(tl.int64) * stride_t + g * stride_g
    if positions_ptr is not None:
        positions_ptr += g * SIZE * D
    dtype = x_ptr.dtype.element_ty
    weight = load_weight(weight_ptr, dtype, D, PADDED_D)
    dx = tl.zeros([ROWS, PADDED_D], tl.float32)
    for back in tl.static_range((SIZE + STRIDE - 1) // STRIDE):
        c, place = t // STRIDE - back, t % STRIDE + back * STRIDE
        live = (t < T) & (place < SIZE) & (c >= 0) & (c < C)
        y = load_tokens(x_ptr, positions_ptr, rows, place, live, D, PADDED_D)
        weighed, ds = score_gradients(
            y, weight, scores_ptr, place, out_ptr, lse_ptr, dout_ptr, (b * C + c) * G + g, live,
            D, PADDED_D, PRECISION,
        )  # fmt: skip
        dx = tl.dot(ds.to(dtype), weight, dx + weighed, input_precision=PRECISION)
    store_rows(dx_ptr, (b * T + t) * G + g, t < T, dx, D, PADDED_D)


@jit
def attention_pool_dw_kernel(
    x_ptr, weight_ptr, scores_ptr, positions_ptr, out_ptr, lse_ptr, dout_ptr, sums_ptr, B, C,
    stride_b, stride_t, stride_g,
    G: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, SIZE: tl.constexpr,
    PADDED_SIZE: tl.constexpr, STRIDE: tl.constexpr, BLOCKS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Every num_programs-th BLOCKS blocks of head g: their share of dW, dp and de."""
    part, parts, g = tl.program_id(0), tl.num_programs(0), tl.program_id(1)
    row = tl.arange(0, BLOCKS * PADDED_SIZE)
    place = row % PADDED_SIZE
    if positions_ptr is not None:
        positions_ptr += g * SIZE * D
    dtype = x_ptr.dtype.element_ty
    weight = load_weight(weight_ptr, dtype, D, PADDED_D)
    dweight = tl.zeros([PADDED_D, PADDED_D], tl.float32)
    dscores = tl.zeros([BLOCKS * PADDED_SIZE, PADDED_D], tl.float32)  # a row sums its own place
    dpositions = tl.zeros([BLOCKS * PADDED_SIZE, PADDED_D], tl.float32)
    tiles = tl.cdiv(C, BLOCKS)
    for tile in tl.range(part, B * tiles, parts, num_stages=1):
        b = (tile // tiles).to(tl.int64)
        c = tile % tiles * BLOCKS + row // PADDED_SIZE
        live = (c < C) & (place < SIZE)
        rows = b * stride_b + (c * STRIDE + place).to(tl.int64) * stride_t + g * stride_g
        y = load_tokens(x_ptr, positions_ptr, rows, place, live, D, PADDED_D)
        weighed, ds = score_gradients(
            y, weight, scores_ptr, place, out_ptr, lse_ptr, dout_ptr, (b * C + c) * G + g, live,
            D, PADDED_D, PRECISION,
        )  # fmt: skip
        dscores += ds
        dpositions += weighed
        dweight = tl.dot(tl.trans(ds.to(dtype)), y, dweight, input_precision=PRECISION)
    dpositions = tl.dot(dscores.to(dtype), weight, dpositions, input_precision=PRECISION)
    dscores = tl.sum(tl.reshape(dscores, [BLOCKS, PADDED_SIZE, PADDED_D]), 0)
    dpositions = tl.sum(tl.reshape(dpositions, [BLOCKS, PADDED_SIZE, PADDED_D]), 0)
    # [parts, G, rows of W | rows of p | rows of e, D]
    sums_ptr += (part * G + g).to(tl.int64) * (D + 2 * SIZE) * D
    channel, place = tl.arange(0, PADDED_D), tl.arange(0, PADDED_SIZE)
    store_rows(sums_ptr, channel, channel < D, dweight, D, PADDED_D)
    store_rows(sums_ptr + D * D, place, place < SIZE, dscores, D, PADDED_D)
    store_rows(sums_ptr + (D + SIZE) * D, place, place < SIZE, dpositions, D, PADDED_D)


def rows_of(width: int) -> int:
    """Tokens that a program takes at once, if no block is longer."""
    return min(64, max(16, NUMBERS // width))


def num_warps(width: int) -> int:
    return 8 if width > 64 else 4


def fits_a_program(size: int, width: int, dtype: torch.dtype) -> bool:
    """Whether a block's tokens, and W, are small enough for a program to hold."""
    return power_of_2(size) * width <= LARGEST and width**2 * dtype.itemsize <= HEAVIEST


@custom_op
def attention_pool_op(
    x: Tensor, weight: Tensor, scores: Tensor, positions: Tensor | None, stride: int
) -> tuple[Tensor, Tensor]:
    """Keys [B, C, G, D] of tokens [B, T, G, D], and what the softmaxes were divided by, as logs."""
    (B, T, G, D), size = x.shape, scores.shape[0]
    C, width = (T - size) // stride + 1, padded(D)
    out = torch.empty(B, C, G, D, dtype=x.dtype, device=x.device)
    lse = torch.empty(B, C, G, D, dtype=torch.float32, device=x.device)
    at_once = max(1, rows_of(width) // power_of_2(size))
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
    width, at_once = padded(D), max(1, rows_of(padded(D)) // power_of_2(size))
    parts = max(1, min(B * cdiv(C, at_once), cdiv(PROGRAMS * num_multiprocessors(x.device), G)))
    sums = torch.empty(parts, G, D + 2 * size, D, dtype=torch.float32, device=x.device)
    given = x, weight, scores, positions, out, lse, dout
    sizes = dict(G=G, D=D, PADDED_D=width, SIZE=size, STRIDE=stride, PRECISION=precision())
    with torch.cuda.device_of(x):
        attention_pool_dx_kernel[(B * G * cdiv(T, rows_of(width)),)](
            *given, dx, T, C, *x.stride()[:3], **sizes, ROWS=rows_of(width),
            num_warps=num_warps(width),
        )  # fmt: skip
        attention_pool_dw_kernel[(parts, G)](
            *given, sums, B, C, *x.stride()[:3], **sizes,
            PADDED_SIZE=power_of_2(size), BLOCKS=at_once, num_warps=num_warps(width),
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
    """See `reference.attention_pool`. What a program cannot hold is left to PyTorch."""
    x = x.to(operands(x[:0])[0].dtype)  # without a copy: heads may lie apart, features may not
    if not fits_a_program(cfg.compress_block_size, padded(x.shape[3]), x.dtype):
        return pooling.attention_pool(x, to_scores, position_scores, positions, cfg)
    x = x if x.stride(3) == 1 else x.contiguous()
    positions = None if positions is None else positions.contiguous()
    stride = cfg.compress_block_sliding_stride
    return attention_pool_op(
        x, to_scores.contiguous(), position_scores.contiguous(), positions, stride
    )[0]
