"""φ of eq. 7: networks that fold a block of n tokens into one, and the module that applies them.

Every network maps [b h w n d] (batch, key/value heads, blocks, tokens of a block, head dimension)
to [b h w d]; any module that does so can be `compress_mlp`. Below, D is `dim_head` and l is
`compress_window_size`.
"""

import copy
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from nsa import blocks, ops
from nsa.compress_transformers import compress_transformer, per_head_transformer
from nsa.config import NSAConfig
from nsa.plugins import Spec, ask, find
from nsa.pooling import pool_windows


class MeanPool(nn.Module):
    """The mean of a block's tokens; no parameters. `ops.block_means` computes it."""

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
    `ops.attention_pool` computes it.
    """

    def __init__(self, dim_head: int, compress_window_size: int) -> None:
        super().__init__()
        self.to_scores = nn.Linear(dim_head, dim_head, bias=False)
        nn.init.zeros_(self.to_scores.weight)
        self.position_scores = nn.Parameter(torch.zeros(compress_window_size, dim_head))

    def forward(self, windows: Float[Tensor, "b h w n d"]) -> Float[Tensor, "b h w d"]:
        return pool_windows(windows, self.to_scores.weight, self.position_scores)

    def pool(
        self,
        x: Float[Tensor, "B T G D"],
        positions: Float[Tensor, "G l D"] | None,
        cfg: NSAConfig,
        *,
        backend: str,
    ) -> Float[Tensor, "B C G D"]:
        """`forward` of the blocks of x, `positions` added."""
        weight, scores = self.to_scores.weight, self.position_scores
        return ops.attention_pool(x, weight, scores, positions, cfg, backend=backend)


class BlockCompressor(nn.Module):
    """Folds keys or values into one per compressed block (eq. 7): φ(tokens of a block + positions).

    `network` is copied, so that keys and values each train their own. `positions`: add a learned
    vector for each place in a block and each key/value head. `backend` computes what `MeanPool` and
    `AttentionPool` would, without storing windows where it can.
    """

    def __init__(
        self,
        network: nn.Module,
        cfg: NSAConfig,
        kv_heads: int,
        dim_head: int,
        *,
        positions: bool,
        backend: str = "torch",
    ) -> None:
        super().__init__()
        self.cfg, self.backend = cfg, backend
        self.network = copy.deepcopy(network)
        self.block_shape = (kv_heads, 1, cfg.compress_block_size, dim_head)  # [G 1 l D]
        self.positions = nn.Parameter(torch.zeros(self.block_shape)) if positions else None

    def forward(self, x: Float[Tensor, "B T G D"]) -> Float[Tensor, "B C G D"]:
        """[B C G D] from [B T G D]; C is 0 where T < l."""
        # A sequence shorter than a block passes φ padded and is dropped behind it: φ's parameters
        # then have gradients (of 0) on every rank, whatever T is.
        missing = max(0, self.cfg.compress_block_size - x.shape[1])
        padded = F.pad(x, (0, 0, 0, 0, 0, missing)) if missing else x
        compressed = self._compress(padded).to(x.dtype)
        return compressed[:, : blocks.num_compress_blocks(x.shape[1], self.cfg)].contiguous()

    def fold(self, block: Float[Tensor, "B l G D"]) -> Float[Tensor, "B G D"]:
        """`forward` of one block."""
        window = block.transpose(1, 2).unsqueeze(2)
        if self.positions is not None:
            window = window + self.positions.to(block.dtype)
        return self.network(window).squeeze(2).to(block.dtype)

    def pooling(self) -> tuple[Tensor | None, Tensor | None, Tensor | None] | None:
        """What makes φ of a block, where it is a weighted mean of tokens; None for any other φ.

        The positions [G 1 l D]; of an `AttentionPool` its weight of scores [D D] and the scores of
        places [l D]. None for what there is not.
        """
        if type(self.network) is MeanPool:
            return self.positions, None, None
        if type(self.network) is AttentionPool:
            return self.positions, self.network.to_scores.weight, self.network.position_scores
        return None

    def flops_per_block(self) -> float:
        """What φ spends on one block, counted as it runs."""
        window = torch.empty(1, *self.block_shape, device="meta")
        sizes = {name: p.shape for name, p in self.network.named_parameters()}  # p may be sharded
        blank = {name: torch.empty(size, device="meta") for name, size in sizes.items()}
        with FlopCounterMode(display=False) as counter:
            functional_call(self.network, blank, window)
        return float(counter.get_total_flops())

    def _compress(self, x: Float[Tensor, "B T G D"]) -> Float[Tensor, "B C G D"]:
        if type(self.network) is MeanPool:
            means = ops.block_means(x, self.cfg, backend=self.backend)
            if self.positions is None:
                return means
            return means + reduce(self.positions, "G 1 l D -> G D", "mean").to(x.dtype)
        if type(self.network) is AttentionPool:
            positions = None if self.positions is None else self.positions.squeeze(1)
            return self.network.pool(x, positions, self.cfg, backend=self.backend)
        windows = blocks.compress_windows(x, self.cfg)
        if self.positions is not None:
            windows = windows + self.positions.to(x.dtype)
        return rearrange(self.network(windows), "B G C D -> B C G D")


@torch.no_grad()
def check_folds(network: nn.Module, kv_heads: int, length: int, dim_head: int) -> None:
    """Raises ValueError unless `network` maps [b h w n d] to [b h w d] for blocks of `length`."""
    found = next(iter([*network.parameters(), *network.buffers()]), None)
    place = {} if found is None else {"device": found.device, "dtype": found.dtype}
    windows = torch.zeros(1, kv_heads, 3, length, dim_head, **place)
    training = {module: module.training for module in network.modules()}
    network.eval()  # no dropout: a check draws nothing
    try:
        shape = tuple(network(windows).shape)
    except Exception as error:
        raise ValueError(
            f"compress_mlp={type(network).__name__} fails on blocks of shape "
            f"{tuple(windows.shape)} [b h w n d]: {error}"
        ) from error
    finally:
        for module, was_training in training.items():
            module.training = was_training
    wanted = (1, kv_heads, 3, dim_head)
    if shape != wanted:
        raise ValueError(
            f"compress_mlp={type(network).__name__} gives shape {shape} for blocks of shape "
            f"{tuple(windows.shape)} [b h w n d]: it must give {wanted} [b h w d], one key a block"
        )


def build_compress_network(
    network: Spec,
    *,
    dim_head: int,
    kv_heads: int,
    compress_block_size: int,
    expand_factor: float = 1.0,
) -> nn.Module:
    """The φ that a config names: one of `NETWORKS`, or one's own (see `nsa.plugins`).

    Its constructor is given what it has parameters for: `dim_head`, `compress_window_size` (l),
    `heads` (the key/value heads) and `expand_factor`.

    Raises:
        ValueError: if there is no such φ, or for options that it does not take.
    """
    return ask(
        find("compress_network", network, NETWORKS),
        dim_head=dim_head,
        compress_window_size=compress_block_size,
        heads=kv_heads,
        expand_factor=expand_factor,
    )


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    "mlp": CompressMLP,
    "grouped_mlp": GroupedMLP,
    "single_projection": partial(SingleProjection, heads=1),
    "conv_linear": ConvLinearCompress,
    "attention_pool": AttentionPool,
    "compress_transformer": compress_transformer,
    "per_head_transformer": per_head_transformer,
    "mean_pool": MeanPool,
}


def _hidden_width(dim: int, expand_factor: float) -> int:
    if expand_factor <= 0:
        raise ValueError(f"expand_factor={expand_factor} must be above 0")
    return max(1, int(dim * expand_factor))


def _uniform(heads: int, dim_in: int, dim_out: int) -> nn.Parameter:
    """One weight a head, [heads, dim_in, dim_out], drawn as nn.Linear draws its own."""
    bound = dim_in**-0.5
    return nn.Parameter(torch.empty(heads, dim_in, dim_out).uniform_(-bound, bound))
