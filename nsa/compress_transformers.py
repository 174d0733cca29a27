"""φ as a small Transformer inside each compressed block.

Letters as in `nsa.compress_networks`.
"""

from typing import cast

import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn


class CompressTransformer(nn.Module):
    """Transformer layers inside each block; a token is one row of all key/value heads side by side.

    So heads mix. The last token's row is the result. Arguments and shape are those of
    native-sparse-attention-pytorch. Blocks do not see one another.

    Args:
        num_layers: at least 1.
        dim: width of a row, kv_heads * dim_head.
        num_heads: attention heads of the layers, a divisor of `dim`.
        ff_hidden_dim: hidden width of their feed-forward; None: 4 * dim.
        dropout: of attention weights and feed-forward, in training.

    Raises:
        ValueError: for an impossible size, and in `forward` for rows of another width.
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        num_heads: int,
        ff_hidden_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.dim = dim
        self.layers = _compress_layers(num_layers, dim, num_heads, ff_hidden_dim, dropout)

    def forward(self, windows: Float[Tensor, "b h w n d"]) -> Float[Tensor, "b h w d"]:
        b, h, _, _, d = windows.shape
        if h * d != self.dim:
            raise ValueError(
                f"CompressTransformer(dim={self.dim}) reads all key/value heads of a token at "
                f"once: dim must be kv_heads * dim_head = {h} * {d} = {h * d} (or use "
                "PerHeadTransformer)"
            )
        x = _residual(rearrange(windows, "b h w n d -> (b w) n (h d)"), self)
        for layer in self.layers[:-1]:
            x = layer(x)
        last = cast(_CompressLayer, self.layers[-1])
        x = last.attend(x)[:, -1]
        return rearrange(x + last.feed_forward(x), "(b w) (h d) -> b h w d", b=b, h=h)


class PerHeadTransformer(nn.Module):
    """Transformer layers inside each block of each head, then the mean over its tokens.

    As `CompressTransformer`, but heads do not mix: `dim` is the head dimension.
    """

    def __init__(
        self,
        num_layers: int,
        dim: int,
        num_heads: int,
        ff_hidden_dim: int | None = None,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers = _compress_layers(num_layers, dim, num_heads, ff_hidden_dim, dropout)

    def forward(self, windows: Float[Tensor, "b h w n d"]) -> Float[Tensor, "b h w d"]:
        b, h, w = windows.shape[:3]
        x = _residual(rearrange(windows, "b h w n d -> (b h w) n d"), self)
        for layer in self.layers:
            x = layer(x)
        return reduce(x, "(b h w) n d -> b h w d", "mean", b=b, h=h, w=w)


def _residual(x: Tensor, network: nn.Module) -> Tensor:
    """In the dtype of the network's parameters, also where autocast made keys bfloat16."""
    return x.to(next(network.parameters()).dtype)


def _compress_layers(
    num_layers: int, dim: int, num_heads: int, ff_hidden_dim: int | None, dropout: float
) -> nn.ModuleList:
    if num_layers < 1:
        raise ValueError(f"num_layers={num_layers} must be at least 1: use MeanPool for none")
    if num_heads < 1 or dim % num_heads:
        raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
    hidden = 4 * dim if ff_hidden_dim is None else ff_hidden_dim
    if hidden < 1:
        raise ValueError(f"ff_hidden_dim={ff_hidden_dim} must be at least 1")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout={dropout} must be at least 0 and below 1")
    return nn.ModuleList(_CompressLayer(dim, num_heads, hidden, dropout) for _ in range(num_layers))


class _CompressLayer(nn.Module):
    """Pre-norm self-attention over the n tokens of a block, then a feed-forward."""

    def __init__(self, dim: int, num_heads: int, hidden: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.attention_norm = nn.RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim)
        self.to_out = nn.Linear(dim, dim)
        self.feed_forward = nn.Sequential(
            nn.RMSNorm(dim), nn.Linear(dim, hidden), nn.GELU(), nn.Dropout(dropout),
            nn.Linear(hidden, dim), nn.Dropout(dropout),
        )  # fmt: skip

    def forward(self, x: Float[Tensor, "batch n d"]) -> Float[Tensor, "batch n d"]:
        x = self.attend(x)
        return x + self.feed_forward(x)

    def attend(self, x: Float[Tensor, "batch n d"]) -> Float[Tensor, "batch n d"]:
        qkv = self.to_qkv(self.attention_norm(x))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        dropout = self.dropout if self.training else 0.0
        attended = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        return x + self.to_out(rearrange(attended, "b h n d -> b n (h d)"))


def compress_transformer(
    dim_head: int,
    heads: int,
    num_layers: int = 1,
    num_heads: int | None = None,
    ff_hidden_dim: int | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """`CompressTransformer` of the right width, with a head a key/value head if not told."""
    return CompressTransformer(
        num_layers, heads * dim_head, num_heads or heads, ff_hidden_dim, dropout
    )


def per_head_transformer(
    dim_head: int,
    num_layers: int = 1,
    num_heads: int = 1,
    ff_hidden_dim: int | None = None,
    dropout: float = 0.0,
) -> nn.Module:
    """`PerHeadTransformer` of the right width."""
    return PerHeadTransformer(num_layers, dim_head, num_heads, ff_hidden_dim, dropout)
