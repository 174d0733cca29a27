"""Attention pooling as an op: launches, sums over programs, and the gradient.

Letters as in `kernels.py`.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from nsa import pooling
from nsa.config import NSAConfig
from nsa.kernels.attention_pooling.kernels import (
    attention_pool_dw_kernel,
    attention_pool_dx_kernel,
    attention_pool_kernel,
)
from nsa.kernels.primitives import (
    cdiv,
    num_multiprocessors,
    operands,
    padded,
    power_of_2,
    precision,
)
from nsa.kernels.registration import custom_op, register_autograd, register_fake

NUMBERS = 4096  # of the tokens that a program holds at once, or a whole block
LARGEST = 8192  # numbers of a block, padded: what a program holds
HEAVIEST = 2**17  # bytes of W, padded
PROGRAMS = 2  # a multiprocessor, that share the parameters' gradients


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
    programs = max(1, min(B * cdiv(C, at_once), cdiv(PROGRAMS * num_multiprocessors(x.device), G)))
    sums = torch.empty(programs, G, D + 2 * size, D, dtype=torch.float32, device=x.device)
    given = x, weight, scores, positions, out, lse, dout
    sizes = dict(G=G, D=D, PADDED_D=width, SIZE=size, STRIDE=stride, PRECISION=precision())
    with torch.cuda.device_of(x):
        attention_pool_dx_kernel[(B * G * cdiv(T, rows_of(width)),)](
            *given, dx, T, C, *x.stride()[:3], **sizes, ROWS=rows_of(width),
            num_warps=num_warps(width),
        )  # fmt: skip
        attention_pool_dw_kernel[(programs, G)](
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
