"""What NSA is compared with: the same layer with dense or with sliding-window attention."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa import blocks, cpu_step, ops
from nsa.backends import resolve_backend
from nsa.blocks import Starts
from nsa.cache import LayerCache, dense_cache, window_cache
from nsa.config import NSAConfig
from nsa.decoding import make_room
from nsa.dense import attend_within_documents, scaled_dot_product
from nsa.gates import zero_linear
from nsa.layer import ProjectingLayer, check_heads, check_tokens, like_keys
from nsa.rotary import Rotary, find_scaling, rotate
from nsa.twin_decoding import Project, dense_attention, window_attention


class Twin(ProjectingLayer):
    """What both twins share: projections, rotation, and the choice between a cache and none."""

    document_alignment = 1
    rotates_by: str = "torch"  # a backend

    def __init__(
        self,
        dim: int,
        dim_head: int,
        heads: int,
        kv_heads: int | None,
        *,
        norm: bool,
        rope_base: float,
        rope_scaling: Mapping[str, Any] | None,
        qk_norm: bool,
    ) -> None:
        super().__init__()
        groups = check_heads(heads, kv_heads, dim_head)
        rotary = Rotary(dim_head, rope_base, find_scaling(rope_scaling))
        self.build_projections(dim, heads, groups, rotary, norm=norm, qk_norm=qk_norm)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(
        self,
        tokens: Float[Tensor, "B T M"],
        cache: LayerCache | None = None,
        return_cache: bool = False,
        *,
        counts: Int[Tensor, " B"] | None = None,
        document_starts: Starts = None,
    ) -> Any:
        """See `SparseAttention.forward`; documents may start anywhere."""
        check_tokens(tokens, self.to_q.in_features)
        self.check_documents(document_starts, tokens, caches=cache is not None or return_cache)
        tokens = self.norm(tokens)
        project = partial(self._project, tokens)
        if cache is None and not return_cache:
            qkv = project(document_starts=document_starts)
            return self._output(tokens, self._attend(*qkv, document_starts))
        cache = self.empty_cache(*tokens.shape[:2]) if cache is None else cache
        make_room(cache, tokens.shape[1], causal=self.causal)
        if cpu_step.takes(tokens, counts, backend=self.rotates_by):
            attended = cpu_step.twin_attention(self, tokens, cache)
        else:
            attended = self._attend_cached(project, cache, counts)
        out = self._output(tokens, attended)
        return (out, cache) if return_cache else out

    @abstractmethod
    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, document_starts: Starts
    ) -> Float[Tensor, "B T H D"]:
        """Attention of a whole sequence, or of the documents in it."""

    @abstractmethod
    def _attend_cached(
        self, project: Project, cache: LayerCache, counts: Int[Tensor, " B"] | None
    ) -> Float[Tensor, "B T H D"]:
        """Attention of new tokens, which `project` gives at their positions, and of the cache."""

    def _output(
        self, tokens: Float[Tensor, "B T M"], out: Float[Tensor, "B T H D"]
    ) -> Float[Tensor, "B T M"]:
        return self.to_out(out.flatten(-2))

    def _project(
        self,
        tokens: Float[Tensor, "B T M"],
        positions: Callable[[int], Int[Tensor, "B T"]] | None = None,
        *,
        document_starts: Starts = None,
    ) -> tuple[Float[Tensor, "B T H D"], Float[Tensor, "B T G D"], Float[Tensor, "B T G D"]]:
        """Queries, keys and values of normed tokens that stand at `positions`, or at 0 … T - 1.

        The latter begin anew with each document.
        """
        q, (k, v) = self.project(tokens)
        k = self.rotary.scale(k)
        num_tokens, backend = tokens.shape[1], self.rotates_by
        if positions is not None:
            angles = self.rotary.angles_at(positions(num_tokens))
            return rotate(q, angles), rotate(k, angles), v
        angles = self.rotary.angles(num_tokens, tokens.device, document_starts)
        return ops.rotate(q, angles, backend=backend), ops.rotate(k, angles, backend=backend), v


class Attention(Twin):
    """Dense attention (eq. 1-2), rotary, through PyTorch's scaled_dot_product_attention.

    `output_gate` multiplies each head's output by a sigmoid of the normed input, as NSA's gates
    do: zero weight and bias at the start (arXiv 2505.06708, headwise).

    It has no `backend`: on every device it attends and rotates as PyTorch does (documents that
    share a row: `nsa.dense`). So what NSA is compared with owes nothing to our kernels, and
    `compile` fuses the rotation as in any model.
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
        rope_scaling: Mapping[str, Any] | None = None,
        qk_norm: bool = False,
    ) -> None:
        super().__init__(
            dim, dim_head, heads, kv_heads,
            norm=norm, rope_base=rope_base, rope_scaling=rope_scaling, qk_norm=qk_norm,
        )  # fmt: skip
        self.causal = causal
        self.to_gate = zero_linear(dim, heads) if output_gate else None

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, document_starts: Starts
    ) -> Float[Tensor, "B T H D"]:
        if document_starts is not None:
            return attend_within_documents(q, k, v, document_starts)
        return scaled_dot_product(q, k, v, causal=self.causal)

    def _attend_cached(
        self, project: Project, cache: LayerCache, counts: Int[Tensor, " B"] | None
    ) -> Float[Tensor, "B T H D"]:
        return dense_attention(project, cache, counts)

    def empty_cache(self, batch: int, capacity: int) -> LayerCache:
        """See `SparseAttention.empty_cache`."""
        return dense_cache(like_keys(self, batch), capacity)

    def _output(
        self, tokens: Float[Tensor, "B T M"], out: Float[Tensor, "B T H D"]
    ) -> Float[Tensor, "B T M"]:
        if self.to_gate is not None:
            out = out * self.to_gate(tokens).sigmoid()[..., None]
        return super()._output(tokens, out)

    def keys_per_query(self, num_tokens: int) -> dict[str, Int[Tensor, " T"]]:
        keys = torch.arange(1, num_tokens + 1)
        return {"dense": keys if self.causal else torch.full_like(keys, num_tokens)}

    def extra_repr(self) -> str:
        return f"heads={self.heads}, kv_heads={self.kv_heads}, causal={self.causal}"


class WindowAttention(Twin):
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
        rope_scaling: Mapping[str, Any] | None = None,
        qk_norm: bool = False,
    ) -> None:
        super().__init__(
            dim, dim_head, heads, kv_heads,
            norm=norm, rope_base=rope_base, rope_scaling=rope_scaling, qk_norm=qk_norm,
        )  # fmt: skip
        self.cfg = NSAConfig(sliding_window_size=sliding_window_size, causal=causal)
        self.causal = causal
        self.backend = self.rotates_by = resolve_backend(
            backend, options=() if causal else ("causal=False",)
        )

    def _attend(
        self, q: Tensor, k: Tensor, v: Tensor, document_starts: Starts
    ) -> Float[Tensor, "B T H D"]:
        return ops.sliding_window_attention(
            q, k, v, self.cfg, document_starts=document_starts, backend=self.backend
        )

    def _attend_cached(
        self, project: Project, cache: LayerCache, counts: Int[Tensor, " B"] | None
    ) -> Float[Tensor, "B T H D"]:
        return window_attention(project, cache, self.cfg, counts, backend=self.backend)

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
