"""Means of compressed blocks (eq. 7 with the mean for φ), one pass forward and one backward."""

import torch
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.jit import jit
from nsa.kernels.primitives import cdiv
from nsa.kernels.registration import custom_op, register_autograd, register_fake

UNROLLED = tl.constexpr(32)  # iterations of the loop; more cost minutes of compiling
BLOCKS, TOKENS, WIDTH = 8, 32, 128  # of a program: forward, backward, and features of either


@jit
def tile_of(num_rows, F: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr):
    """A program's sequence, its ROWS rows, and its WIDTH features."""
    tiles, slices = tl.cdiv(num_rows, ROWS), tl.cdiv(F, WIDTH)
    slice_, tile = tl.program_id(0) % slices, tl.program_id(0) // slices
    rows = tile % tiles * ROWS + tl.arange(0, ROWS)
    return (tile // tiles).to(tl.int64), rows, (slice_ * WIDTH + tl.arange(0, WIDTH))[None, :]


@jit
def block_means_kernel(
    x_ptr, means_ptr, T, C,
    F: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS blocks of one sequence: the mean of their SIZE tokens."""
    b, c, features = tile_of(C, F, ROWS, WIDTH)
    live = (c < C)[:, None] & (features < F)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for i in tl.range(SIZE, loop_unroll_factor=UNROLLED):  # an unrolled load waits for no other
        rows = b * T + c * STRIDE + i
        total += tl.load(x_ptr + rows[:, None] * F + features, mask=live, other=0.0).to(tl.float32)
    means = (total / SIZE).to(means_ptr.dtype.element_ty)
    tl.store(means_ptr + (b * C + c)[:, None] * F + features, means, mask=live)


@jit
def block_means_bwd_kernel(
    dmeans_ptr, dx_ptr, T, C,
    F: tl.constexpr, SIZE: tl.constexpr, STRIDE: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one sequence: 1/l of the gradient of each block over them."""
    b, t, features = tile_of(T, F, ROWS, WIDTH)
    total = tl.zeros([ROWS, WIDTH], tl.float32)
    for back in tl.static_range((SIZE + STRIDE - 1) // STRIDE):
        c = t // STRIDE - back
        over = (c >= 0) & (c < C) & (t < c * STRIDE + SIZE)
        rows = b * C + c
        dmeans = tl.load(
            dmeans_ptr + rows[:, None] * F + features,
            mask=over[:, None] & (features < F), other=0.0,
        )  # fmt: skip
        total += dmeans.to(tl.float32)
    dx = (total / SIZE).to(dx_ptr.dtype.element_ty)
    live = (t < T)[:, None] & (features < F)
    tl.store(dx_ptr + (b * T + t)[:, None] * F + features, dx, mask=live)


def launch(
    kernel, rows: int, source: Tensor, out: Tensor, T: int, C: int, size: int, stride: int
) -> None:
    B, num_rows, G, D = out.shape
    with torch.cuda.device_of(out):
        kernel[(B * cdiv(num_rows, rows) * cdiv(G * D, WIDTH),)](
            source, out, T, C, F=G * D, SIZE=size, STRIDE=stride,
            ROWS=rows, WIDTH=WIDTH, num_warps=4,
        )  # fmt: skip


@custom_op
def block_means_op(x: Tensor, size: int, stride: int) -> Tensor:
    B, T, G, D = x.shape
    C = (T - size) // stride + 1
    means = torch.empty(B, C, G, D, dtype=x.dtype, device=x.device)
    launch(block_means_kernel, BLOCKS, x, means, T, C, size, stride)
    return means


@custom_op
def block_means_backward_op(dmeans: Tensor, num_tokens: int, size: int, stride: int) -> Tensor:
    B, C, G, D = dmeans.shape
    dx = torch.empty(B, num_tokens, G, D, dtype=dmeans.dtype, device=dmeans.device)
    launch(block_means_bwd_kernel, TOKENS, dmeans, dx, num_tokens, C, size, stride)
    return dx


@register_fake(block_means_op)
def _(x, size, stride):
    B, T, G, D = x.shape
    return x.new_empty(B, (T - size) // stride + 1, G, D)


@register_fake(block_means_backward_op)
def _(dmeans, num_tokens, size, stride):
    B, _, G, D = dmeans.shape
    return dmeans.new_empty(B, num_tokens, G, D)


def _save(ctx, inputs, output):
    x, *ctx.sizes = inputs
    ctx.num_tokens = x.shape[1]


def _backward(ctx, dmeans):
    return block_means_backward_op(dmeans.contiguous(), ctx.num_tokens, *ctx.sizes), None, None


register_autograd(block_means_op, _backward, setup_context=_save)


def block_means(x: Float[Tensor, "B T G D"], cfg: NSAConfig) -> Float[Tensor, "B C G D"]:
    """The mean of each compressed block, for at least l tokens, summed in float32."""
    return block_means_op(
        x.contiguous(), cfg.compress_block_size, cfg.compress_block_sliding_stride
    )
