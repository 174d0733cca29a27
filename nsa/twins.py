"""What NSA is compared with: the same layer with dense, or with sliding-window attention."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa import blocks, decoding, ops
from nsa.backends import resolve_backend
from nsa.cache import LayerCache, dense_cache, window_cache
from nsa.config import NSAConfig
from nsa.gates import zero_linear
from nsa.layer import AttentionLayer, check_heads, check_tokens, like_keys
from nsa.rotary import angles_at, rotary_angles, rotate


class Attention(AttentionLayer):
    """Dense attention (eq. 1-2), rotary, through PyTorch's scaled_dot_product_attention.

    `output_gate` multiplies each head's output by a sigmoid of the normed input, as NSA's gates
    do: zero weight and bias at the start (arXiv 2505.06708, headwise).

    It has no `backend`: on every device it attends and rotates as PyTorch does. So what NSA is
    compared with owes nothing to our kernels, and `compile` fuses the rotation as in any model.
    """

    def __init__(
        self,
        dim: int,
        dim_head: int,
        heads: int,
        kv_heads: int | None = None,
        causal: bool = True,
        norm: bool = True,
        *,
        output_gate: bool = False,
        rope_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        self.heads, self.dim_head, self.causal = heads, dim_head, causal
        self.kv_heads = check_heads(heads, kv_heads, dim_head)
        self.rope_base = rope_base
        self.norm = nn.RMSNorm(dim) if norm else nn.Identity()
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * self.kv_heads * dim_head, bias=False)
        self.to_gate = zero_linear(dim, heads) if output_gate else None
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(
        self,
        tokens: Float[Tensor, "B T M"],
        cache: LayerCache | None = None,
        return_cache: bool = False,
        *,
        counts: Int[Tensor, " B"] | None = None,
    ) -> Any:
        """See `SparseAttention.forward`."""
        check_tokens(tokens, self.to_q.in_features)
        tokens = self.norm(tokens)
        if cache is None and not return_cache:
            q, k, v = rotated_qkv(self, tokens, "torch")
            return self._gated(tokens, decoding.scaled_dot_product(q, k, v, causal=self.causal))
        cache = self.empty_cache(*tokens.shape[:2]) if cache is None else cache
        project = partial(rotated_qkv, self, tokens, "torch")
        decoding.make_room(cache, tokens.shape[1], causal=self.causal)
        out = self._gated(tokens, decoding.dense_attention(project, cache, counts))
        return (out, cache) if return_cache else out

    def empty_cache(self, batch: int, capacity: int) -> LayerCache:
        """See `SparseAttention.empty_cache`."""
        return dense_cache(like_keys(self, batch), capacity)

    def _gated(
        self, tokens: Float[Tensor, "B T M"], out: Float[Tensor, "B T H D"]
    ) -> Float[Tensor, "B T M"]:
        if self.to_gate is not None:
            out = out * self.to_gate(tokens).sigmoid()[..., None]
        return self.to_out(rearrange(out, "B T H D -> B T (H D)"))

    def keys_per_query(self, num_tokens: int) -> dict[str, Int[Tensor, " T"]]:
        keys = torch.arange(1, num_tokens + 1)
        return {"dense": keys if self.causal else torch.full_like(keys, num_tokens)}

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, causal={self.causal}"


class WindowAttention(AttentionLayer):
    """Sliding-window attention alone: exactly `sliding_window_size` keys, rotary."""

    def __init__(
        self,
        dim: int,
        dim_head: int,
        heads: int,
        sliding_window_size: int,
        kv_heads: int | None = None,
        causal: bool = True,
        norm: bool = True,
        backend: str = "auto",
        *,
        rope_base: float = 10_000.0,
    ) -> None:
        super().__init__()
        self.cfg = NSAConfig(sliding_window_size=sliding_window_size, causal=causal)
        self.heads, self.dim_head = heads, dim_head
        self.kv_heads = check_heads(heads, kv_heads, dim_head)
        self.rope_base = rope_base
        self.backend = resolve_backend(backend, options=() if causal else ("causal=False",))
        self.norm = nn.RMSNorm(dim) if norm else nn.Identity()
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, 2 * self.kv_heads * dim_head, bias=False)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(
        self,
        tokens: Float[Tensor, "B T M"],
        cache: LayerCache | None = None,
        return_cache: bool = False,
        *,
        counts: Int[Tensor, " B"] | None = None,
    ) -> Any:
        """See `SparseAttention.forward`."""
        check_tokens(tokens, self.to_q.in_features)
        tokens = self.norm(tokens)
        if cache is None and not return_cache:
            q, k, v = rotated_qkv(self, tokens, self.backend)
            out = ops.sliding_window_attention(q, k, v, self.cfg, backend=self.backend)
            return self.to_out(out.flatten(-2))
        cache = self.empty_cache(*tokens.shape[:2]) if cache is None else cache
        project = partial(rotated_qkv, self, tokens, self.backend)
        decoding.make_room(cache, tokens.shape[1], causal=self.cfg.causal)
        out = decoding.window_attention(project, cache, self.cfg, counts, backend=self.backend)
        out = self.to_out(out.flatten(-2))
        return (out, cache) if return_cache else out

    def empty_cache(self, batch: int, capacity: int) -> LayerCache:
        """See `SparseAttention.empty_cache`."""
        return window_cache(self.cfg.sliding_window_size, like_keys(self, batch), capacity)

    def keys_per_query(self, num_tokens: int) -> dict[str, Int[Tensor, " T"]]:
        return {"sliding": blocks.keys_per_query(num_tokens, self.cfg)["sliding"]}

    def extra_repr(self) -> str:
        return (
            f"w={self.cfg.sliding_window_size}, heads={self.heads}, kv_heads={self.kv_heads}, "
            f"causal={self.cfg.causal}, backend={self.backend}"
        )


def rotated_qkv(
    attn: Attention | WindowAttention,
    tokens: Float[Tensor, "B T M"],
    backend: str,
    positions: Callable[[int], Int[Tensor, "B T"]] | None = None,
) -> tuple[Float[Tensor, "B T H D"], Float[Tensor, "B T G D"], Float[Tensor, "B T G D"]]:
    """Queries, keys and values of normed tokens that stand at `positions`, or at 0 … T - 1."""
    q = rearrange(attn.to_q(tokens), "B T (H D) -> B T H D", H=attn.heads)
    k, v = rearrange(attn.to_kv(tokens), "B T (P G D) -> P B T G D", P=2, G=attn.kv_heads)
    if positions is not None:
        angles = angles_at(positions(tokens.shape[1]), attn.dim_head, base=attn.rope_base)
        return rotate(q, angles), rotate(k, angles), v
    angles = rotary_angles(
        tokens.shape[1], attn.dim_head, base=attn.rope_base, device=tokens.device
    )
    return ops.rotate(q, angles, backend=backend), ops.rotate(k, angles, backend=backend), v
