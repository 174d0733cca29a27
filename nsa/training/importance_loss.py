"""A loss that teaches the scores which select blocks where attention looks (KL divergence).

NSA's scores learn only from what the compressed branch does for the output. Here a sample of
queries compares, in each layer, what its scores say of the blocks with the mass that dense
attention gives them, by the queries and keys of the selected branch. DeepSeek-V3.2 (arXiv
2512.02556) and MSA (arXiv 2606.13392) teach their indexers so, with the teacher and the indexer's
input detached.

Letters as in `nsa.reference`; Q sampled queries of a sequence.
"""

import math
from collections.abc import Sequence
from typing import TypeGuard

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nsa import blocks, ops, reference
from nsa.attention import SparseAttention
from nsa.blocks import Starts
from nsa.layer import AttentionLayer
from nsa.selection import attention_mass
from nsa.transformer import Transformer


class ImportanceLoss:
    """The divergence of the scores from attention mass, as a mean over layers, queries and heads.

    Over the free blocks: forced ones are kept whatever they score. A query counts by the mass that
    its free blocks have. Gradients reach φ of the keys, the projection of the compressed keys and
    their norm (φ alone where branches share keys), nothing else: queries serve all branches, and
    the layer's input serves the layers below.

    In memory it takes a layer's B·H·Q·T scores at a time, and its compressed keys.

    Args:
        model: whose layers learn.
        weight: of the loss beside the cross-entropy; 0 turns it off.
        num_queries: Q, drawn anew for each sequence, layer and step. Where a sequence has no more
            tokens than that, each of its queries is taken once.

    Raises:
        ValueError: for a number that is too small, and, with a weight, for a model that cannot
            learn from it.
    """

    def __init__(self, model: Transformer, weight: float = 0.0, num_queries: int = 32) -> None:
        if isinstance(weight, bool) or not 0 <= weight < math.inf:
            raise ValueError(
                f"importance_loss.weight={weight} must be a number of at least 0; 0 turns it off"
            )
        if num_queries < 1:
            raise ValueError(f"importance_loss.num_queries={num_queries} must be at least 1")
        self.weight, self.num_queries = weight, num_queries
        self.layers = learning_layers(model)
        if weight:
            check_can_learn([layer for layer in self.layers if layer is not None])

    def __call__(
        self, layer_inputs: Sequence[Float[Tensor, "B T M"]], document_starts: Starts = None
    ) -> Float[Tensor, ""]:
        """The loss, not yet weighed.

        Args:
            layer_inputs: what each layer of the model was given, see `Transformer.forward`.
        """
        losses = [
            divergence(layer, tokens.detach(), self._draw(tokens), document_starts)
            for layer, tokens in zip(self.layers, layer_inputs, strict=True)
            if layer is not None
        ]
        return torch.stack(losses).mean()

    def _draw(self, tokens: Tensor) -> Int[Tensor, "B Q"]:
        num_rows, num_tokens = tokens.shape[:2]
        if num_tokens <= self.num_queries:
            return torch.arange(num_tokens, device=tokens.device).expand(num_rows, -1)
        return torch.randint(num_tokens, (num_rows, self.num_queries), device=tokens.device)


def learning_layers(model: Transformer) -> list[SparseAttention | None]:
    """Of all layers those whose scores select blocks; None for the others."""
    return [block.attention if selects(block.attention) else None for block in model.blocks]


def selects(layer: AttentionLayer) -> TypeGuard[SparseAttention]:
    """Whether a layer selects blocks, and by what it has learned."""
    is_sparse = isinstance(layer, SparseAttention)
    return is_sparse and layer.selection == "learned" and layer.cfg.num_selected_blocks > 0


def check_can_learn(layers: Sequence[SparseAttention]) -> None:
    """Raises ValueError where there is no score to teach, or none that says what the loss needs."""
    if not layers:
        raise ValueError(
            "importance_loss.weight is above 0, and no layer of the model selects blocks by "
            "learned scores: set importance_loss.weight=0"
        )
    for layer in layers:
        if layer.cfg.importance != "probability_sum":
            raise ValueError(
                "importance_loss compares probabilities: it needs "
                "attention.importance=probability_sum"
            )
        if shares_keys(layer) and next(layer.compress_k.parameters(), None) is None:
            raise ValueError(
                "importance_loss with attention.kv_per_branch=false teaches φ alone, and this φ "
                "has no parameters: take kv_per_branch=true, or another compress_network"
            )


def shares_keys(layer: SparseAttention) -> bool:
    """Whether the compressed keys are made from those of another branch."""
    return layer.kv_layout[0] in layer.kv_layout[2:]


def divergence(
    layer: SparseAttention,
    tokens: Float[Tensor, "B T M"],
    at: Int[Tensor, "B Q"],
    document_starts: Starts = None,
) -> Float[Tensor, ""]:
    """KL(attention mass ‖ importance) over the free blocks of the queries at positions `at`."""
    cfg, num_tokens, shared = layer.cfg, tokens.shape[1], layer.shared_selection
    told = {"positions": at, "document_starts": None}
    if document_starts is not None:
        told["document_starts"] = document_starts.gather(1, at)
    with torch.no_grad():
        heads = layer.split_heads(tokens)
        angles = layer.rotary.angles(num_tokens, tokens.device, document_starts)
        q_rot, k_rot = (
            ops.rotate(x, angles, backend=layer.backend) for x in (heads.q, heads.k_slc)
        )
        mass = attention_mass(queries_at(q_rot, at), k_rot, cfg, shared, **told)
        mass = mass / mass.sum(-1, keepdim=True)  # of all heads that share their blocks
        q = queries_at(heads.q, at).float()
        free = blocks.priority(num_tokens, cfg, **told)[..., None, :] == blocks.FREE
    k_cmp = layer.compress_k(keys_to_teach(layer, tokens)).float()
    with reference.full_precision(tokens.device.type):
        mem_k, mem_v = layer.memory(q)
        _, lse = reference.compressed_attention(
            q, k_cmp, k_cmp.detach(), cfg, detached(mem_k), detached(mem_v),
            num_tokens=num_tokens, **told,
        )  # fmt: skip
        importance = reference.block_importance(
            q, k_cmp, lse, cfg, shared, num_tokens=num_tokens, **told
        )
        return weighed_divergence(mass.float() * free, importance * free)


def weighed_divergence(
    mass: Float[Tensor, "B Q J S"], importance: Float[Tensor, "B Q J S"]
) -> Float[Tensor, ""]:
    """The mean over queries and heads of KL(mass ‖ importance), each normed to 1 over the blocks,
    times the query's mass; 0 where there is none.
    """
    tiny = torch.finfo(importance.dtype).tiny
    total = mass.sum(-1, keepdim=True)
    target = mass.clamp(min=tiny).log() - total.clamp(min=tiny).log()
    found = (
        importance.clamp(min=tiny).log() - importance.sum(-1, keepdim=True).clamp(min=tiny).log()
    )
    return (mass * (target - found)).sum(-1).mean()


def keys_to_teach(layer: SparseAttention, tokens: Float[Tensor, "B T M"]) -> Tensor:
    """The keys of the compressed branch, with a graph of their own projection alone."""
    with torch.no_grad():
        normed = layer.norm(tokens)
        if shares_keys(layer):
            return layer.project(normed)[1][0]
    place, width = layer.kv_layout[0], layer.kv_heads * layer.dim_head
    rows = layer.to_kv.weight[place * width : (place + 1) * width]
    keys = F.linear(normed, rows).unflatten(-1, (layer.kv_heads, layer.dim_head))
    return keys if layer.k_norms is None else layer.k_norms[str(place)](keys)


def queries_at(q: Float[Tensor, "B T H D"], at: Int[Tensor, "B Q"]) -> Float[Tensor, "B Q H D"]:
    return q.take_along_dim(at[..., None, None], dim=1)


def detached(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.detach()
