"""Compressed blocks (eq. 7) of those φ that have ops of their own: mean, and attention pooling."""

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from nsa import blocks
from nsa.config import NSAConfig


class _BlockMeans(torch.autograd.Function):
    """`block_means`. A token gets 1/l of the gradient of each block over it, written once.

    Block c covers the strides c ... c + l/d - 1, and the first l % d tokens of one more.
    """

    @staticmethod
    def forward(ctx, x: Tensor, size: int, stride: int) -> Tensor:
        ctx.sizes = size, stride, x.shape[1]
        return x.unfold(1, size, stride).mean(-1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        size, stride, num_tokens = ctx.sizes
        whole, rest = divmod(size, stride)
        strides = -(-num_tokens // stride)
        B, C, *features = grad.shape
        share = F.pad(grad / size, (0, 0, 0, 0, whole, strides - C))  # [B whole+strides G D]
        covering = share[:, 1:].unfold(1, whole, 1).sum(-1).to(grad.dtype)  # [B strides G D]
        dx = grad.new_empty(B, strides, stride, *features)
        dx[:, :, rest:] = covering[:, :, None]
        if rest:
            dx[:, :, :rest] = (covering + share[:, :strides])[:, :, None]
        return dx.flatten(1, 2)[:, :num_tokens], None, None


def block_means(x: Float[Tensor, "B T G D"], cfg: NSAConfig) -> Float[Tensor, "B C G D"]:
    """The mean of each compressed block, for at least l tokens; its windows are never stored."""
    return _BlockMeans.apply(x, cfg.compress_block_size, cfg.compress_block_sliding_stride)


def attention_pool(
    x: Float[Tensor, "B T G D"],
    to_scores: Float[Tensor, "D D"],
    position_scores: Float[Tensor, "l D"],
    positions: Float[Tensor, "G l D"] | None,
    cfg: NSAConfig,
) -> Float[Tensor, "B C G D"]:
    """See `reference.attention_pool`. Each head's tokens are made into windows first."""
    windows = blocks.compress_windows(x, cfg)
    if positions is not None:
        windows = windows + positions[:, None].to(x.dtype)
    return pool_windows(windows, to_scores, position_scores).transpose(1, 2).to(x.dtype)


def pool_windows(
    windows: Float[Tensor, "b h w n d"],
    to_scores: Float[Tensor, "d d"],
    position_scores: Float[Tensor, "n d"],
) -> Float[Tensor, "b h w d"]:
    """Each block's tokens, weighed in each channel by the softmax of their scores."""
    weights = (F.linear(windows, to_scores) + position_scores).softmax(dim=-2)
    return (weights * windows).sum(-2)
