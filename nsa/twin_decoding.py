"""Attention of the twins' tokens that come after others: see `nsa.decoding`."""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa import blocks, ops
from nsa.cache import LayerCache
from nsa.config import NSAConfig
from nsa.decoding import attend_to_window
from nsa.dense import scaled_dot_product

# Queries, keys and values of a layer's new tokens, which stand where a function of their number
# says; None: at 0, 1, …
Project = Callable[[Callable[[int], Tensor] | None], tuple[Tensor, Tensor, Tensor]]


@torch.no_grad()
def window_attention(
    project: Project,
    cache: LayerCache,
    cfg: NSAConfig,
    counts: Int[Tensor, " B"] | None = None,
    *,
    backend: str,
) -> Float[Tensor, "B n H D"]:
    """Sliding-window attention of tokens after those of the cache, which takes them in."""
    if not cache.longest:
        q, k, v = project(None)
        out = ops.sliding_window_attention(q, k, v, cfg, backend=backend)
    else:
        q, k, v = project(cache.positions)
        out = attend_to_window(q, k, v, cache, cfg)
    num_new = q.shape[1]
    cache.push("window", (k, v), cache.lengths + (num_new if counts is None else counts))
    cache.advance(num_new, counts)
    return out


@torch.no_grad()
def dense_attention(
    project: Project, cache: LayerCache, counts: Int[Tensor, " B"] | None = None
) -> Float[Tensor, "B n H D"]:
    """Dense attention of tokens after those of the cache, which takes them in."""
    is_first = not cache.longest
    q, k, v = project(None if is_first else cache.positions)
    positions = cache.positions(q.shape[1])
    cache.write("dense", (k, v), positions)
    cache.advance(q.shape[1], counts)
    if is_first:
        return scaled_dot_product(q, k, v, causal=True)
    k, v = (x[:, : cache.longest] for x in cache["dense"])
    mask = blocks.causal(k.shape[1], k.device, positions)[:, None]
    return scaled_dot_product(q, k, v, mask=mask)
