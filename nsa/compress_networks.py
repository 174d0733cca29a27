"""φ of eq. 7: networks that fold a block of n tokens into one, and the module that applies them.

Every network maps [b h w n d] (batch, key/value heads, blocks, tokens of a block, head dimension)
to [b h w d]; any module that does so can be `compress_mlp`. Below, D is `dim_head` and l is
`compress_window_size`.
"""

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn

from nsa import blocks
from nsa.config import NSAConfig
from nsa.pooling import block_means


class MeanPool(nn.Module):
    """The mean of a block's tokens; no parameters. `BlockCompressor` takes `block_means` for it."""

    def forward(self, windows: Float[Tensor, "b h w n d"]) -> Float[Tensor, "b h w d"]:
        return reduce(windows, "b h w n d -> b h w d", "mean")


class CompressMLP(nn.Module):
    """The paper's φ: one hidden layer of expand_factor * l * D units over a block's l * D numbers.

    All heads share it. It weighs (l * D)^2 * expand_factor: choose the factor well below 1.
    """

    def __init__(
        self, dim_head: int, compress_window_size: int, expand_factor: float = 1.0
    ) -> None:
        super().__init__()
        dim = compress_window_size * dim_head
        hidden = _hidden_width(dim, expand_factor)
        self.layers = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, dim_head))

    def forward(self, windows: Float[Tensor, "b h w n d"]) -> Float[Tensor, "b h w d"]:
        return self.layers(rearrange(windows, "b h w n d -> b h w (n d)"))


class GroupedMLP(nn.Module):
    """`CompressMLP` with weights of its own for each key/value head."""

    def __init__(
        self, dim_head: int, compress_window_size: int, heads: int, expand_factor: float = 1.0
    ) -> None:
        super().__init__()
        dim = compress_window_size * dim_head
        hidden = _hidden_width(dim, expand_factor)
        self.weight_in = _uniform(heads, dim, hidden)
        self.bias_in = nn.Parameter(torch.zeros(heads, 1, hidden))
        self.weight_out = _uniform(heads, hidden, dim_head)
        self.bias_out = nn.Parameter(torch.zeros(heads, 1, dim_head))

    def forward(self, windows: Float[Tensor, "b h w n d"]) -> Float[Tensor, "b h w d"]:
        x = rearrange(windows, "b h w n d -> b h w (n d)")
        hidden = F.gelu(x @ self.weight_in + self.bias_in)
        return hidden @ self.weight_out + self.bias_out


class SingleProjection(nn.Module):
    """One linear map from a block's l * D numbers to D, for each head or (heads=1) for all."""

    def __init__(self, dim_head: int, compress_window_size: int, heads: int = 1) -> None:
        super().__init__()
        self.weight = _uniform(heads, compress_window_size * dim_head, dim_head)
        self.bias = nn.Parameter(torch.zeros(heads, 1, dim_head))

    def forward(self, windows: Float[Tensor, "b h w n d"]) -> Float[Tensor, "b h w d"]:
        return rearrange(windows, "b h w n d -> b h w (n d)") @ self.weight + self.bias


class ConvLinearCompress(nn.Module):
    """A convolution that reads each block once: a linear map for each head, written as a Conv1d."""

    def __init__(self, heads: int, dim_head: int, compress_window_size: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(
            heads * dim_head,
            heads * dim_head,
            kernel_size=compress_window_size,
            stride=compress_window_size,
            groups=heads,
        )

    def forward(self, windows: Float[Tensor, "b h w n d"]) -> Float[Tensor, "b h w d"]:
        out = self.conv(rearrange(windows, "b h w n d -> b (h d) (w n)"))
        return rearrange(out, "b (h d) w -> b h w d", h=windows.shape[1])


class AttentionPool(nn.Module):
    """A weighted mean of a block's tokens, the weights a softmax, over the block, in each channel.

    Scores come from a token's content and its place in the block. They start at 0: a plain mean.
    """

    def __init__(self, dim_head: int, compress_window_size: int) -> None:
        super().__init__()
        self.to_scores = nn.Linear(dim_head, dim_head, bias=False)
        nn.init.zeros_(self.to_scores.weight)
        self.position_scores = nn.Parameter(torch.zeros(compress_window_size, dim_head))

    def forward(self, windows: Float[Tensor, "b h w n d"]) -> Float[Tensor, "b h w d"]:
        weights = (self.to_scores(windows) + self.position_scores).softmax(dim=-2)
        return reduce(weights * windows, "b h w n d -> b h w d", "sum")


class CompressTransformer(nn.Module):
    """Pre-norm Transformer layers inside each block, then the mean over its tokens.

    `dim` is the head dimension; `num_heads` divides it. Blocks do not see one another.
    """

    def __init__(self, num_layers: int, dim: int, num_heads: int) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers={num_layers} must be at least 1: use MeanPool for none")
        if dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}")
        self.layers = nn.ModuleList(_CompressLayer(dim, num_heads) for _ in range(num_layers))

    def forward(self, windows: Float[Tensor, "b h w n d"]) -> Float[Tensor, "b h w d"]:
        residual_dtype = next(self.parameters()).dtype  # also where autocast made keys bfloat16
        x = rearrange(windows, "b h w n d -> (b h w) n d").to(residual_dtype)
        for layer in self.layers:
            x = layer(x)
        b, h, w = windows.shape[:3]
        return reduce(x, "(b h w) n d -> b h w d", "mean", b=b, h=h, w=w)


class _CompressLayer(nn.Module):
    """Self-attention over the n tokens of a block, then a feed-forward of twice the width."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.RMSNorm(dim)
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)
        self.feed_forward = nn.Sequential(
            nn.RMSNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim)
        )

    def forward(self, x: Float[Tensor, "batch n d"]) -> Float[Tensor, "batch n d"]:
        qkv = self.to_qkv(self.attention_norm(x))
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", three=3, h=self.num_heads)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.to_out(rearrange(attended, "b h n d -> b n (h d)"))
        return x + self.feed_forward(x)


class BlockCompressor(nn.Module):
    """Folds keys or values into one per compressed block (eq. 7): φ(tokens of a block + positions).

    `network` is copied, so that keys and values each train their own. `positions`: add a learned
    vector for each place in a block and each key/value head. `means` computes what `MeanPool` would
    without storing windows.
    """

    def __init__(
        self,
        network: nn.Module,
        cfg: NSAConfig,
        kv_heads: int,
        dim_head: int,
        *,
        positions: bool,
        means: Callable[[Tensor, NSAConfig], Tensor] = block_means,
    ) -> None:
        super().__init__()
        self.cfg, self.means = cfg, means
        self.network = copy.deepcopy(network)
        shape = (kv_heads, 1, cfg.compress_block_size, dim_head)
        self.positions = nn.Parameter(torch.zeros(shape)) if positions else None

    def forward(self, x: Float[Tensor, "B T G D"]) -> Float[Tensor, "B C G D"]:
        """[B C G D] from [B T G D]; C is 0 where T < l."""
        # A sequence shorter than a block passes φ padded and is dropped behind it: φ's parameters
        # then have gradients (of 0) on every rank, whatever T is.
        missing = max(0, self.cfg.compress_block_size - x.shape[1])
        padded = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
        compressed = self._compress(padded).to(x.dtype)
        return compressed[:, : blocks.num_compress_blocks(x.shape[1], self.cfg)].contiguous()

    def _compress(self, x: Float[Tensor, "B T G D"]) -> Float[Tensor, "B C G D"]:
        if type(self.network) is MeanPool:
            means = self.means(x, self.cfg)
            if self.positions is None:
                return means
            return means + reduce(self.positions, "G 1 l D -> G D", "mean").to(x.dtype)
        windows = blocks.compress_windows(x, self.cfg)
        if self.positions is not None:
            windows = windows + self.positions.to(x.dtype)
        return rearrange(self.network(windows), "B G C D -> B C G D")


def build_compress_network(
    name: str,
    *,
    dim_head: int,
    kv_heads: int,
    compress_block_size: int,
    expand_factor: float = 1.0,
) -> nn.Module:
    """The network called `name` in the configs; only the two MLPs read `expand_factor`.

    Raises ValueError for an unknown name.
    """
    d, length = dim_head, compress_block_size
    builders = {
        "mlp": lambda: CompressMLP(d, length, expand_factor),
        "grouped_mlp": lambda: GroupedMLP(d, length, kv_heads, expand_factor),
        "single_projection": lambda: SingleProjection(d, length),
        "conv_linear": lambda: ConvLinearCompress(kv_heads, d, length),
        "attention_pool": lambda: AttentionPool(d, length),
        "compress_transformer": lambda: CompressTransformer(1, d, 1),
        "mean_pool": MeanPool,
    }
    if name not in builders:
        raise ValueError(
            f"compress_network={name!r} is unknown: choose one of {', '.join(sorted(builders))}"
        )
    return builders[name]()


def _hidden_width(dim: int, expand_factor: float) -> int:
    if expand_factor <= 0:
        raise ValueError(f"expand_factor={expand_factor} must be above 0")
    return max(1, int(dim * expand_factor))


def _uniform(heads: int, dim_in: int, dim_out: int) -> nn.Parameter:
    """One weight a head, [heads, dim_in, dim_out], drawn as nn.Linear draws its own."""
    bound = dim_in**-0.5
    return nn.Parameter(torch.empty(heads, dim_in, dim_out).uniform_(-bound, bound))
