"""The kinds of attention layers that a `Transformer` is built of, by name."""

from collections.abc import Callable, Mapping
from inspect import signature
from typing import Any

from nsa.attention import Attention, SparseAttention, WindowAttention
from nsa.compress_networks import build_compress_network
from nsa.layer import AttentionLayer
from nsa.plugins import Spec, ask, find, label


def sparse_attention(
    dim: int,
    dim_head: int,
    heads: int,
    kv_heads: int,
    attention: Mapping[str, Any],
    layer: int,
) -> SparseAttention:
    """An NSA layer from `Transformer`'s argument `attention`, which names its φ."""
    phi = build_compress_network(
        attention["compress_network"],
        dim_head=dim_head,
        kv_heads=kv_heads,
        compress_block_size=attention["compress_block_size"],
        expand_factor=attention["compress_mlp_expand_factor"],
    )
    options: dict[str, Any] = {"selection_seed": layer} | dict(attention)
    del options["compress_network"]
    return SparseAttention(dim, dim_head, heads, kv_heads=kv_heads, compress_mlp=phi, **options)


LAYER_KINDS: dict[str, Callable[..., AttentionLayer]] = {
    "nsa": sparse_attention,
    "window": WindowAttention,
    "dense": Attention,
}
ATTENTION_OPTIONS = {"compress_network", *signature(SparseAttention).parameters}


def build_layer(kind: Spec, **known: Any) -> AttentionLayer:
    """The attention of one layer: one of `LAYER_KINDS`, or one's own (`nsa.plugins`, `nsa.layer`).

    Its constructor is given those that it has parameters for: `dim`, `dim_head`, `heads`,
    `kv_heads`, `output_gate`, `layer` (its number), the options of `attention` by their names, and
    `attention` itself.

    Raises:
        ValueError: if there is no such kind, or if it is not an `AttentionLayer`.
    """
    layer = ask(find("layer_pattern", kind, LAYER_KINDS), **known)
    if not isinstance(layer, AttentionLayer):
        raise ValueError(
            f"layer_pattern: {label(type(layer))} is not a layer kind: derive it from "
            "nsa.layer.AttentionLayer, which says what a layer must have"
        )
    return layer
