"""What every attention layer of a `Transformer` is: the contract for a layer kind of one's own.

A layer maps tokens [B T M] to tokens [B T M] and norms its own input. Its constructor is given the
sizes and options of `Transformer` that it has parameters for.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from nsa.cache import LayerCache
from nsa.documents import check_documents, check_no_cache
from nsa.rotary import Rotary


class AttentionLayer(nn.Module, ABC):
    """Base of the layer kinds.

    A subclass sets `heads` and `dim_head`, ends in the linear layer `to_out` (initialised smaller
    in deeper models), and says what its queries read, so that a model's cost can be counted.

    A layer that keeps the documents of a row apart takes `document_starts` in `forward`, and says
    by `document_alignment` at multiples of which token they must start; None: it does not.
    """

    heads: int
    dim_head: int
    to_out: nn.Linear
    document_alignment: int | None = None

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


class HeadNorm(nn.RMSNorm):
    """RMSNorm over the head dimension; heads keep their dtype, which autocast may have chosen."""

    def __init__(self, dim_head: int) -> None:
        super().__init__(dim_head, eps=1e-6)  # PyTorch's own eps would depend on the dtype

    def forward(self, x: Float[Tensor, "*B H D"]) -> Float[Tensor, "*B H D"]:
        weight = self.weight.to(x.dtype)
        return F.rms_norm(x, self.normalized_shape, weight, self.eps).to(x.dtype)


class ProjectingLayer(AttentionLayer):
    """A layer kind that projects its normed input to rotated queries, keys and values."""

    causal: bool
    kv_heads: int
    kv_layout: tuple[int, ...]
    rotary: Rotary

    def build_projections(
        self,
        dim: int,
        heads: int,
        kv_heads: int,
        rotary: Rotary,
        *,
        norm: bool,
        qk_norm: bool,
        kv_layout: Sequence[int] = (0, 1),
    ) -> None:
        """Make `norm`, `to_q`, `to_kv` and, with `qk_norm`, the norms of queries and keys.

        Args:
            kv_layout: the place in `to_kv`'s output of the keys and the values of each branch, in
                turn; branches may share a place.
        """
        self.heads, self.dim_head, self.kv_heads = heads, rotary.dim_head, kv_heads
        self.kv_layout, self.rotary = tuple(kv_layout), rotary
        self.norm = nn.RMSNorm(dim) if norm else nn.Identity()
        self.to_q = nn.Linear(dim, heads * self.dim_head, bias=False)
        kv_width = (max(kv_layout) + 1) * kv_heads * self.dim_head
        self.to_kv = nn.Linear(dim, kv_width, bias=False)
        self.q_norm = self.k_norms = None
        if qk_norm:  # each branch learns how sharp its scores are, so its keys have their own norm
            self.q_norm = HeadNorm(self.dim_head)
            places = sorted(set(self.kv_layout[::2]))
            self.k_norms = nn.ModuleDict({str(i): HeadNorm(self.dim_head) for i in places})

    def check_documents(
        self, document_starts: Tensor | None, tokens: Tensor, *, caches: bool
    ) -> None:
        """Raises ValueError for documents that are not laid out for this layer, or not for it."""
        if document_starts is None:
            return
        check_no_cache(document_starts, caches)
        if not self.causal:
            raise ValueError(
                "document_starts with causal=False: documents that share a row need causal=True"
            )
        num_rows, num_tokens = tokens.shape[:2]
        check_documents(document_starts, num_rows, num_tokens, self.document_alignment or 1)

    def project(
        self, tokens: Float[Tensor, "*B M"]
    ) -> tuple[Float[Tensor, "*B H D"], list[Float[Tensor, "*B G D"]]]:
        """Queries, and keys and values in the order of `kv_layout`, of normed tokens."""
        q = self.to_q(tokens).unflatten(-1, (self.heads, self.dim_head))
        kv = list(self.to_kv(tokens).unflatten(-1, (-1, self.kv_heads, self.dim_head)).unbind(-3))
        if self.q_norm is not None and self.k_norms is not None:
            q = self.q_norm(q)
            for place, norm in self.k_norms.items():
                kv[int(place)] = norm(kv[int(place)])
        return q, [kv[i] for i in self.kv_layout]


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
    if not tokens.dtype.is_floating_point:
        raise ValueError(f"tokens has dtype {tokens.dtype}: attention takes floats, not token ids")
