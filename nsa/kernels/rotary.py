"""Rotary embedding: every head's pairs rotated by its token's angles, one pass either way."""

import torch
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from nsa.kernels.jit import jit
from nsa.kernels.primitives import cdiv, power_of_2
from nsa.kernels.registration import custom_op, register_autograd, register_fake

TOKENS = 16  # of a program


@jit
def rotate_kernel(
    x_ptr, angles_ptr, out_ptr, T, num_tokens, stride_b, stride_t, stride_h,
    H: tl.constexpr, HALF: tl.constexpr, BACK: tl.constexpr, BY_ROW: tl.constexpr,
    PADDED_HALF: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """TOKENS tokens, one head after the other: (x[i], x[i + HALF]) by the token's angle i.

    Angles are [T, HALF], or BY_ROW of the batch [B, T, HALF].
    """
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    b, t = token // T, token % T
    i = tl.arange(0, PADDED_HALF)[None, :]
    live = (token < num_tokens)[:, None] & (i < HALF)
    place = token if BY_ROW else t
    angles = angles_ptr + place[:, None] * HALF + i
    angle = tl.load(angles, mask=live, other=0.0)  # [TOKENS, PADDED_HALF]
    cos, sin = tl.cos(angle), tl.sin(angle)
    if BACK:
        sin = -sin
    dtype = out_ptr.dtype.element_ty
    for h in range(H):
        pairs = x_ptr + (b * stride_b + t * stride_t + h * stride_h)[:, None] + i
        first = tl.load(pairs, mask=live, other=0.0).to(tl.float32)
        second = tl.load(pairs + HALF, mask=live, other=0.0).to(tl.float32)
        out = out_ptr + ((token * H + h) * (2 * HALF))[:, None] + i
        tl.store(out, (first * cos - second * sin).to(dtype), mask=live)
        tl.store(out + HALF, (second * cos + first * sin).to(dtype), mask=live)


@custom_op
def rotate_op(x: Tensor, angles: Tensor, back: bool) -> Tensor:
    B, T, H, D = x.shape
    out = torch.empty(B, T, H, D, dtype=x.dtype, device=x.device)
    with torch.cuda.device_of(x):
        rotate_kernel[(cdiv(B * T, TOKENS),)](
            x, angles, out, T, B * T, *x.stride()[:3],
            H=H, HALF=D // 2, BACK=back, BY_ROW=angles.ndim == 3, PADDED_HALF=power_of_2(D // 2),
            TOKENS=TOKENS, num_warps=4,
        )  # fmt: skip
    return out


@register_fake(rotate_op)
def _(x, angles, back):
    return x.new_empty(x.shape)


def _save(ctx, inputs, output):
    _, angles, ctx.back = inputs
    ctx.save_for_backward(angles)


def _backward(ctx, dout):
    (angles,) = ctx.saved_tensors
    return rotate_op(rows_whole(dout), angles, not ctx.back), None, None


register_autograd(rotate_op, _backward, setup_context=_save)


def rows_whole(x: Tensor) -> Tensor:
    """x, copied only if the numbers of a head are apart."""
    return x if x.stride(3) == 1 else x.contiguous()


def rotate(
    x: Float[Tensor, "B T H D"], angles: Float[Tensor, "*B T half"]
) -> Float[Tensor, "B T H D"]:
    """Rotate the pairs (x[i], x[i + D/2]) in float32; x may be a view whose heads are apart.

    Differentiable in x.
    """
    return rotate_op(rows_whole(x), angles.contiguous(), False)
