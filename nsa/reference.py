"""Native Sparse Attention in plain PyTorch, in the order of the paper (arXiv 2502.11089).

Written to be read and to be believed: masks are dense, nothing is clever, any device and any
float dtype will do. Other backends are judged by these functions, never the other way round.

    means of compressed blocks      eq. 7      block_means
    attention over compressed keys  eq. 7      compressed_attention
    importance of selection blocks  eq. 8-10   block_importance
    the n blocks that are kept      eq. 11     select_blocks
    attention inside them           eq. 12     selected_attention
    attention over the last tokens  s. 3.3.3   sliding_window_attention
    the gated sum of the branches   eq. 5      combine
    rotary position embedding                  rotate

Letters: B batch, T tokens, K keys, H query heads, G key/value heads, R = H/G query heads a group,
D head dimension (Dv of values), C compressed blocks, S selection blocks, N selected blocks, J index
heads: G, or H where every query head selects for itself.
Memory keys, Nm of them, stand before the compressed ones. Scores are kept as [B G R T K].
Softmax and importance are computed in float32 or better, whatever the inputs.

Queries stand at the T tokens that there are, or at `positions` among `num_tokens`: the latter is
decoding, with keys from a cache. `document_starts` separates documents that share a row (`blocks`).
"""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from einops import einsum, rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nsa import blocks
from nsa.config import NSAConfig
from nsa.importance import RULES
from nsa.rotary import rotate as rotate


def scaled_scores(
    q: Float[Tensor, "B T H D"], k: Float[Tensor, "B K G D"]
) -> Float[Tensor, "B G R T K"]:
    """q.k / sqrt(D), each query head against the key head of its group."""
    q = rearrange(q * q.shape[-1] ** -0.5, "B T (G R) D -> B G R T D", G=k.shape[2])
    return einsum(q, k, "B G R T D, B K G D -> B G R T K")


def attend(
    scores: Float[Tensor, "B G R T K"],
    v: Float[Tensor, "B K G Dv"],
    mask: Bool[Tensor, "#B #G #R T K"],
) -> tuple[Float[Tensor, "B T H Dv"], Float[Tensor, "B G R T K"]]:
    """Softmax attention over the keys the mask shows, and the masked scores.

    A query that sees nothing gets zeros. Hidden scores are the lowest finite number, not -inf, so
    that such a row has finite gradients.
    """
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    probs = scores.softmax(dim=-1, dtype=_at_least_float32(scores)).to(v.dtype)
    out = einsum(probs, v, "B G R T K, B K G Dv -> B T G R Dv")
    sees_nothing = rearrange(~mask.any(dim=-1), "B G R T -> B T G R 1")
    return rearrange(out.masked_fill(sees_nothing, 0.0), "B T G R Dv -> B T (G R) Dv"), scores


def block_means(x: Float[Tensor, "B T G D"], cfg: NSAConfig) -> Float[Tensor, "B C G D"]:
    """The mean of each compressed block, for at least l tokens: eq. 7 with the mean for φ."""
    return reduce(blocks.compress_windows(x, cfg), "B G C l D -> B C G D", "mean")


def attention_pool(
    x: Float[Tensor, "B T G D"],
    to_scores: Float[Tensor, "D D"],
    position_scores: Float[Tensor, "l D"],
    positions: Float[Tensor, "G l D"] | None,
    cfg: NSAConfig,
) -> Float[Tensor, "B C G D"]:
    """Each compressed block, for at least l tokens: eq. 7 with `AttentionPool` for φ.

    A mean of the block's tokens, each with its place's vector of `positions` added, weighed in each
    channel by the softmax over the block of `to_scores` times a token, plus its position's scores.
    """
    windows = blocks.compress_windows(x, cfg)
    if positions is not None:
        windows = windows + positions[:, None].to(x.dtype)
    scores = einsum(to_scores, windows, "E D, B G C l D -> B G C l E") + position_scores
    pooled = einsum(scores.softmax(dim=-2), windows, "B G C l D, B G C l D -> B C G D")
    return pooled.to(x.dtype)


def for_all_heads(mask: Bool[Tensor, "*B T K"]) -> Bool[Tensor, "#B 1 1 T K"]:
    """A mask as `attend` takes it."""
    return (mask if mask.ndim == 3 else mask[None])[:, None, None]


def compressed_attention(
    q: Float[Tensor, "B T H D"],
    k_cmp: Float[Tensor, "B C G D"],
    v_cmp: Float[Tensor, "B C G Dv"],
    cfg: NSAConfig,
    mem_k: Float[Tensor, "G Nm D"] | None = None,
    mem_v: Float[Tensor, "G Nm Dv"] | None = None,
    *,
    positions: Int[Tensor, "B T"] | None = None,
    num_tokens: int | None = None,
    document_starts: blocks.Starts = None,
) -> tuple[Float[Tensor, "B T H Dv"], Float[Tensor, "B T H"]]:
    """Attention over compressed keys (eq. 7), and the natural-log sum of exponents of its scores.

    Memory keys are always visible and take part in both. Where nothing is visible the output is 0
    and lse is -inf. Both are differentiable.
    """
    num_tokens = num_tokens or q.shape[1]
    mask = blocks.compress_visible(num_tokens, cfg, q.device, positions, document_starts)
    if mem_k is not None and mem_v is not None:
        batch, num_memories = q.shape[0], mem_k.shape[1]
        k_cmp = torch.cat([repeat(mem_k, "G Nm D -> B Nm G D", B=batch), k_cmp], dim=1)
        v_cmp = torch.cat([repeat(mem_v, "G Nm D -> B Nm G D", B=batch), v_cmp], dim=1)
        mask = F.pad(mask, (num_memories, 0), value=True)
    out, scores = attend(scaled_scores(q, k_cmp), v_cmp, for_all_heads(mask))
    lse = scores.to(_at_least_float32(scores)).logsumexp(dim=-1)
    lse = lse.masked_fill(~for_all_heads(mask).any(dim=-1), float("-inf"))
    return out, rearrange(lse, "B G R T -> B T (G R)")


def block_importance(
    q: Float[Tensor, "B T H D"],
    k_cmp: Float[Tensor, "B C G D"],
    lse: Float[Tensor, "B T H"],
    cfg: NSAConfig,
    shared: bool = True,
    *,
    positions: Int[Tensor, "B T"] | None = None,
    num_tokens: int | None = None,
    document_starts: blocks.Starts = None,
) -> Float[Tensor, "B T J S"]:
    """How much each query makes of each selection block (eq. 8-10); J is G, or H if not shared.

    By the rule `cfg.importance` (see `nsa.importance`). Differentiable in q, k_cmp and lse.
    """
    num_tokens = num_tokens or q.shape[1]
    scores, lse = scaled_scores(q, k_cmp), rearrange(lse, "B T (G R) -> B G R T", G=k_cmp.shape[2])
    if not shared:
        scores = rearrange(scores, "B G R T C -> B (G R) 1 T C")
        lse = rearrange(lse, "B G R T -> B (G R) 1 T")
    scores = scores.to(_at_least_float32(scores))
    visible = blocks.compress_visible(num_tokens, cfg, q.device, positions, document_starts)
    overlap = blocks.block_overlap(num_tokens, cfg, q.device).to(scores)
    rule = RULES[cfg.importance] if isinstance(cfg.importance, str) else cfg.importance
    with full_precision(q.device.type):  # a ranking hangs on these sums
        importance = rule(scores, lse, for_all_heads(visible), overlap)
    return rearrange(importance, "B J T S -> B T J S")


@torch.no_grad()
def select_blocks(
    q: Float[Tensor, "B T H D"],
    k_cmp: Float[Tensor, "B C G D"],
    lse: Float[Tensor, "B T H"],
    cfg: NSAConfig,
    shared: bool = True,
    *,
    positions: Int[Tensor, "B T"] | None = None,
    num_tokens: int | None = None,
    document_starts: blocks.Starts = None,
) -> Int[Tensor, "B T J N"]:
    """The n blocks each query keeps (eq. 11), int32: ascending, distinct, -1 in empty slots.

    Forced blocks first (`blocks.priority`), then by importance, and the lower block of two whose
    computed importances are equal. Importances that are equal on paper may differ by the rounding
    of their sums. Always n = cfg.num_selected_blocks wide. Not differentiable.
    """
    at: dict[str, Any] = dict(positions=positions, num_tokens=num_tokens or q.shape[1])
    at["document_starts"] = document_starts
    return top_blocks(block_importance(q, k_cmp, lse, cfg, shared, **at), cfg, **at)


def top_blocks(
    importance: Float[Tensor, "B T J S"],
    cfg: NSAConfig,
    *,
    positions: Int[Tensor, "B T"] | None = None,
    num_tokens: int | None = None,
    document_starts: blocks.Starts = None,
) -> Int[Tensor, "B T J N"]:
    """The blocks that `select_blocks` keeps where these are the importances."""
    num_blocks, num_tokens = importance.shape[-1], num_tokens or importance.shape[1]
    rank = blocks.priority(num_tokens, cfg, importance.device, positions, document_starts)
    rank = rank.unsqueeze(-2)
    forced = rank.to(importance) * (torch.finfo(importance.dtype).max / 4)  # above any importance
    score = torch.where(rank > blocks.FREE, forced, importance)
    score = score.masked_fill(rank == blocks.INELIGIBLE, float("-inf"))
    score, index = score.sort(dim=-1, descending=True, stable=True)
    score, index = score[..., : cfg.num_selected_blocks], index[..., : cfg.num_selected_blocks]
    index = index.masked_fill(score == float("-inf"), num_blocks).sort(dim=-1).values
    index = index.masked_fill(index == num_blocks, -1).int()
    return F.pad(index, (0, cfg.num_selected_blocks - index.shape[-1]), value=-1)


def selected_importance(
    q: Float[Tensor, "B T H D"],
    k_cmp: Float[Tensor, "B C G D"],
    lse: Float[Tensor, "B T H"],
    block_indices: Int[Tensor, "B T J N"],
    cfg: NSAConfig,
    mem_k: Float[Tensor, "G Nm D"] | None = None,
    *,
    document_starts: blocks.Starts = None,
) -> Float[Tensor, "B T J N"]:
    """`block_importance` of the chosen blocks, 0 in empty slots: what `use_diff_topk` trains.

    lse is that of `compressed_attention` over k_cmp and mem_k, with its graph. Here gradients reach
    q, k_cmp and mem_k through it, and mem_k needs no other mention. A backend may instead return
    the whole gradient of q, k_cmp and mem_k itself, and none of lse.
    """
    shared = block_indices.shape[2] == k_cmp.shape[2]
    importance = block_importance(q, k_cmp, lse, cfg, shared, document_starts=document_starts)
    chosen = importance.gather(-1, block_indices.long().clamp(min=0))
    return chosen.masked_fill(block_indices < 0, 0.0)


def selected_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B K G D"],
    v: Float[Tensor, "B K G Dv"],
    block_indices: Int[Tensor, "B T J N"],
    cfg: NSAConfig,
    block_gates: Float[Tensor, "B T J N"] | None = None,
    *,
    positions: Int[Tensor, "B T"] | None = None,
    document_starts: blocks.Starts = None,
) -> Float[Tensor, "B T H Dv"]:
    """Attention over the tokens of the selected blocks (eq. 12).

    J is G, or H, where every query head has a selection of its own.
    `block_gates` multiply the scores of their block's tokens; gates of value 1 that carry a
    gradient (straight-through) let the loss reach the importances.
    """
    num_tokens, groups = k.shape[1], k.shape[2]

    def by_group(x: Tensor) -> Tensor:
        return rearrange(x, "B T (G R) K -> B G R T K", G=groups)

    seen = blocks.selected_tokens(block_indices, num_tokens, cfg, positions, document_starts)
    scores = scaled_scores(q, k)
    if block_gates is not None:
        num_blocks = blocks.num_selection_blocks(num_tokens, cfg)
        gates = blocks.per_block(block_indices, block_gates, num_blocks)
        own = blocks.own_block(num_tokens, cfg, q.device)
        scores = scores * by_group(gates[..., own]).to(scores)
    return attend(scores, v, by_group(seen))[0]


def sliding_window_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B K G D"],
    v: Float[Tensor, "B K G Dv"],
    cfg: NSAConfig,
    *,
    positions: Int[Tensor, "B T"] | None = None,
    key_positions: Int[Tensor, "B K"] | None = None,
    document_starts: blocks.Starts = None,
) -> Float[Tensor, "B T H Dv"]:
    """Attention over the last w tokens, the query's own included.

    Keys of a cache come in any order, with their positions; negative ones are no keys.
    """
    if positions is None or key_positions is None:
        mask = blocks.sliding_window(q.shape[1], cfg, q.device, document_starts=document_starts)
    else:
        s, t = key_positions[:, None], positions[..., None]
        mask = blocks.in_window(t, s, cfg, blocks.each_query(document_starts)) & (s >= 0)
    return attend(scaled_scores(q, k), v, for_all_heads(mask))[0]


def combine(
    gates: Float[Tensor, "B T H 3"],
    compressed: Float[Tensor, "B T H Dv"],
    selected: Float[Tensor, "B T H Dv"],
    sliding: Float[Tensor, "B T H Dv"],
) -> Float[Tensor, "B T H Dv"]:
    """The gated sum of the three branches (eq. 5)."""
    g_cmp, g_slc, g_win = gates[..., None].unbind(dim=-2)
    return g_cmp * compressed + g_slc * selected + g_win * sliding


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def full_precision(device_type: str) -> AbstractContextManager:
    """Keeps autocast away from float32 products; a device without autocast needs no keeping."""
    available = torch.amp.is_autocast_available(device_type)
    return torch.autocast(device_type, enabled=False) if available else nullcontext()
