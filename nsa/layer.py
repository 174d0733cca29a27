"""What every attention layer of a `Transformer` is: the contract for a layer kind of one's own.

A layer maps tokens [B T M] to tokens [B T M] and norms its own input. Its constructor is given the
sizes and options of `Transformer` that it has parameters for.
"""

from abc import ABC, abstractmethod

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa.cache import LayerCache


class AttentionLayer(nn.Module, ABC):
    """Base of the layer kinds.

    A subclass sets `heads` and `dim_head`, ends in the linear layer `to_out` (initialised smaller
    in deeper models), and says what its queries read, so that a model's cost can be counted.
    """

    heads: int
    dim_head: int
    to_out: nn.Linear

    @abstractmethod
    def keys_per_query(self, num_tokens: int) -> dict[str, Int[Tensor, " T"]]:
        """How many keys every query of a sequence reads, by the name of the branch."""

    def compress_flops(self, num_tokens: int) -> float:
        """What the forward pass spends on compressing keys and values; 0 for most layers."""
        return 0.0

    def empty_cache(self, batch: int, capacity: int) -> LayerCache:
        """A cache of no tokens; a layer that has one takes it in `forward`, for decoding.

        Raises:
            ValueError: where a layer kind has none (`Transformer.has_cache`).
        """
        raise ValueError(
            f"{type(self).__name__} has no cache: sample with use_cache_kv=False, or give the "
            "layer kind an empty_cache(batch, capacity)"
        )


class ProjectingLayer(AttentionLayer):
    """A layer kind that projects its normed input to rotated queries, keys and values."""

    kv_heads: int
    rope_base: float

    def build_projections(
        self, dim: int, dim_head: int, heads: int, kv_heads: int, *, kv_width: int, norm: bool
    ) -> None:
        """Make `norm`, `to_q` and `to_kv`; `kv_width` is that of all keys and values together."""
        self.heads, self.dim_head, self.kv_heads = heads, dim_head, kv_heads
        self.norm = nn.RMSNorm(dim) if norm else nn.Identity()
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, kv_width, bias=False)


def like_keys(attn: ProjectingLayer, batch: int) -> Float[Tensor, "B 0 G D"]:
    """An array of no keys, in the dtype and on the device of those that a layer makes."""
    weight = attn.to_kv.weight
    dtype = weight.dtype
    if torch.is_autocast_enabled(weight.device.type):
        dtype = torch.get_autocast_dtype(weight.device.type)
    # Not weight.new_empty: a sharded weight would make a sharded cache.
    shape = batch, 0, attn.kv_heads, attn.dim_head
    return torch.empty(shape, dtype=dtype, device=weight.device)


def check_heads(heads: int, kv_heads: int | None, dim_head: int) -> int:
    """The number of key/value heads. Raises ValueError if heads cannot be grouped or rotated."""
    kv_heads = heads if kv_heads is None else kv_heads
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"heads={heads} must be a multiple of kv_heads={kv_heads}")
    if dim_head % 2:
        raise ValueError(f"dim_head={dim_head} must be even: rotary embedding rotates pairs")
    return kv_heads


def check_tokens(tokens: Tensor, dim: int) -> None:
    """Raises ValueError unless tokens are floats of shape [B, T, dim], at least one a row."""
    if tokens.ndim != 3 or tokens.shape[-1] != dim:
        raise ValueError(
            f"tokens has shape {tuple(tokens.shape)}: it must be [batch, tokens, dim] with "
            f"dim={dim}" + ("; tokens[None] makes a batch of one" if tokens.ndim == 2 else "")
        )
    if not tokens.shape[1]:
        raise ValueError("tokens is empty: each sequence needs at least one token")
    if not torch.is_floating_point(tokens):
        raise ValueError(f"tokens has dtype {tokens.dtype}: attention takes floats, not token ids")
