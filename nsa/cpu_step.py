"""One token of each sequence against a cache in plain PyTorch, where the host knows the lengths.

That is so on a CPU. There each small operation costs as much as its arithmetic, so that a step has
to do with few: with lengths at hand it slices what a query sees, and has no masks. Sequences of the
same length go together, others one by one. Letters as in `nsa.reference`; the token is number t.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nsa import blocks, reference
from nsa.cache import KeysValues, LayerCache
from nsa.config import NSAConfig
from nsa.importance import RULES
from nsa.rotary import Rotary, frequencies

PORTABLE = ("torch", "flex")  # backends that have no decode kernels; "reference" stays the oracle
Parts = dict[str, KeysValues]
# What one token of each sequence is projected to, the parts, and t; what the token attends to.
Step = Callable[[Sequence[Tensor], Parts, int], Float[Tensor, "B G R D"]]


def takes(
    tokens: Float[Tensor, "B n M"], counts: Int[Tensor, " B"] | None, *, backend: str
) -> bool:
    """Whether these tokens are for the functions below."""
    one_each = tokens.shape[1] == 1 and counts is None
    return one_each and tokens.device.type == "cpu" and backend in PORTABLE


def sparse_attention(
    attn: Any, tokens: Float[Tensor, "B 1 M"], cache: LayerCache
) -> Float[Tensor, "B 1 H D"]:
    """The gated sum of the branches for a token a sequence, which the cache takes in."""
    return by_length(partial(gated_sum, attn), attn.split_heads(tokens[:, 0]), cache)


@torch.no_grad()
def twin_attention(
    attn: Any, tokens: Float[Tensor, "B 1 M"], cache: LayerCache
) -> Float[Tensor, "B 1 H D"]:
    """Dense or sliding-window attention of a normed token a sequence, which the cache takes in."""
    q, (k, v) = attn.project(tokens[:, 0])
    return by_length(partial(attend_to_all, attn), (q, attn.rotary.scale(k), v), cache)


def by_length(step: Step, heads: Sequence[Tensor], cache: LayerCache) -> Float[Tensor, "B 1 H D"]:
    """A step of all sequences, at once if they have the same length."""
    lengths = cache.lengths.tolist()
    if min(lengths) == max(lengths):
        out = step(heads, cache.parts, lengths[0])
    else:
        outs = []
        for b, t in enumerate(lengths):
            parts = {name: part.of_row(b) for name, part in cache.parts.items()}
            outs.append(step([x[b : b + 1] for x in heads], parts, t))
        out = torch.cat(outs)
    cache.advance(1)
    return out.flatten(1, 2).unsqueeze(1)


def attend_to_all(
    attn: Any, heads: Sequence[Tensor], parts: Parts, t: int
) -> Float[Tensor, "B G R D"]:
    """Attention to the token and all that the only part keeps, which may be a ring."""
    q, k, v = heads
    (part,) = parts.values()
    q, k = turned(torch.cat([q, k], 1), t, attn.rotary).split([attn.heads, attn.kv_heads], 1)
    size = part.k.shape[1]
    part.put(t % size, k, v)
    return dense(by_group(q, attn.kv_heads), part, min(t + 1, size))


def gated_sum(attn: Any, heads: Sequence[Tensor], parts: Parts, t: int) -> Float[Tensor, "B G R D"]:
    """`sparse_attention` of sequences that all have t tokens in these parts."""
    cfg, (q, *_, gates) = attn.cfg, heads
    q_rot = remember(attn, heads, parts, t)
    probs, scores, compressed = attend_compressed(attn, q, parts["compressed"], t)
    if not cfg.num_selected_blocks:
        selected = torch.zeros_like(q_rot)
    elif t < cfg.num_selected_blocks * cfg.selection_block_size:  # every block is kept
        selected = dense(q_rot, parts["selected"], t + 1)
    else:
        importance = block_importance(attn, probs, scores, t)
        selected = attend_selected(q_rot, parts["selected"], keep(importance, t, cfg), t, cfg)
    sliding = dense(q_rot, parts["window"], min(t + 1, cfg.sliding_window_size))
    branches = torch.stack([compressed, selected, sliding], 3)
    return (by_group(gates, attn.kv_heads).unsqueeze(3) @ branches).squeeze(3)


def remember(attn: Any, heads: Sequence[Tensor], parts: Parts, t: int) -> Float[Tensor, "B G R D"]:
    """The token enters all parts, and so does the compressed block that ends with it.

    Returns rotated queries.
    """
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win, _ = heads
    H, G, cfg = attn.heads, attn.kv_heads, attn.cfg
    rotated = turned(torch.cat([q, k_slc, k_win], 1), t, attn.rotary)
    q, k_slc, k_win = rotated.split([H, G, G], 1)
    parts["tail"].put(t % cfg.compress_block_size, k_cmp, v_cmp)
    parts["window"].put(t % cfg.sliding_window_size, k_win, v_win)
    if cfg.num_selected_blocks:
        parts["selected"].put(t, k_slc, v_slc)
    c = blocks.num_compress_blocks(t, cfg)
    if blocks.num_compress_blocks(t + 1, cfg) > c:
        networks = (attn.compress_k, attn.compress_v)
        whole = [ring.roll(-(t + 1), 1) for ring in parts["tail"]]
        folded = [phi.fold(x) for phi, x in zip(networks, whole, strict=False)]
        parts["compressed"].put(c, *folded)
    return by_group(q, G)


def turned(x: Float[Tensor, "B H D"], t: int, rotary: Rotary) -> Float[Tensor, "B H D"]:
    """`rotate` at position t."""
    cos, sin = turn(t, rotary)
    swapped = x.roll(rotary.dim_head // 2, -1)
    return torch.addcmul(x * cos, swapped, sin).to(x.dtype)  # in float32 or better


@lru_cache(maxsize=8)
def turn(t: int, rotary: Rotary) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """What multiplies a row at position t, and the same row with its halves exchanged."""
    angles = t * frequencies(rotary)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos]), torch.cat([-sin, sin])


def by_group(x: Float[Tensor, "B H D"], G: int) -> Float[Tensor, "B G R D"]:
    """Heads that share keys side by side."""
    B, H, D = x.shape
    return x.view(B, G, H // G, D)


def first(
    part: KeysValues, num_keys: int
) -> tuple[Float[Tensor, "B G K D"], Float[Tensor, "B G K D"]]:
    """So many keys and values of a part."""
    k, v = part.by_head
    return (k, v) if k.shape[2] == num_keys else (k[:, :, :num_keys], v[:, :, :num_keys])


def dense(q: Float[Tensor, "B G R D"], part: KeysValues, num_keys: int) -> Float[Tensor, "B G R D"]:
    """Attention to the first keys and values of a part."""
    return F.scaled_dot_product_attention(q, *first(part, num_keys))


def attend_compressed(
    attn: Any, q: Float[Tensor, "B H D"], part: KeysValues, t: int
) -> tuple[Float[Tensor, "B G R C"], Float[Tensor, "B G R C"], Float[Tensor, "B G R D"]]:
    """Probabilities and scores of compressed keys, without memory keys, and the output."""
    k, v = first(part, blocks.num_compress_blocks(t + 1, attn.cfg))
    mem_k, mem_v = attn.memory(q)
    memories = 0
    if mem_k is not None and mem_v is not None:
        memories = mem_k.shape[1]
        k = torch.cat([mem_k.expand(len(q), -1, -1, -1), k], 2)
        v = torch.cat([mem_v.expand(len(q), -1, -1, -1), v], 2)
    q = by_group(q * q.shape[-1] ** -0.5, attn.kv_heads)
    scores = q @ k.transpose(2, 3)
    probs = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    sees = attn.compressed_output and k.shape[2]
    out = probs.to(v.dtype) @ v if sees else torch.zeros_like(q)
    if memories:
        probs, scores = probs[..., memories:], scores[..., memories:]
    return probs, scores, out


def block_importance(
    attn: Any, probs: Float[Tensor, "B G R C"], scores: Float[Tensor, "B G R C"], t: int
) -> Float[Tensor, "B J S"]:
    """`reference.block_importance` of the blocks up to the token's own, by J choices."""
    cfg = attn.cfg
    overlap = overlaps(t // cfg.selection_block_size, cfg, probs.dtype)[: probs.shape[-1]]
    if not attn.shared_selection:
        probs, scores = (x.flatten(1, 2).unsqueeze(2) for x in (probs, scores))
    with reference.full_precision("cpu"):
        if cfg.importance == "probability_sum":  # as the rule has it, the probabilities at hand
            return probs.sum(2) @ overlap
        probs, scores = (x.to(overlap)[..., None, :] for x in (probs, scores))
        lse = scores[..., 0] - probs[..., 0].log()
        rule = RULES[cfg.importance] if isinstance(cfg.importance, str) else cfg.importance
        visible = torch.ones(1, 1, 1, 1, probs.shape[-1], dtype=torch.bool)
        return rule(scores, lse, visible, overlap)[:, :, 0]


@lru_cache(maxsize=16)
def overlaps(own: int, cfg: NSAConfig, dtype: torch.dtype) -> Float[Tensor, "C S"]:
    """`blocks.block_overlap` of the blocks up to the own one, kept from step to step."""
    return blocks.block_overlap((own + 1) * cfg.selection_block_size, cfg).to(dtype)


def keep(importance: Float[Tensor, "B J S"], t: int, cfg: NSAConfig) -> Int[Tensor, "B J N"]:
    """`reference.top_blocks` of more than n blocks, the last of them the query's own."""
    least = forced(t // cfg.selection_block_size, cfg, importance.dtype)
    best = torch.maximum(importance, least).sort(dim=-1, descending=True, stable=True).indices
    return best[..., : cfg.num_selected_blocks].sort(-1).values


@lru_cache(maxsize=16)
def forced(own: int, cfg: NSAConfig, dtype: torch.dtype) -> Float[Tensor, " S"]:
    """The least that blocks count for: more than any importance if they are kept whatever it is."""
    rank = blocks.priority((own + 1) * cfg.selection_block_size, cfg)[-1].to(dtype)
    return torch.where(rank > blocks.FREE, rank * (torch.finfo(dtype).max / 4), float("-inf"))


def attend_selected(
    q: Float[Tensor, "B G R D"],
    part: KeysValues,
    kept: Int[Tensor, "B J N"],
    t: int,
    cfg: NSAConfig,
) -> Float[Tensor, "B G R D"]:
    """Attention inside the selected blocks. The last is the query's own, and ends with it."""
    (B, K, G, D), length, J = part.k.shape, cfg.selection_block_size, kept.shape[1]
    num_keys = (kept.shape[2] - 1) * length + t % length + 1
    row = torch.add(rows(B, K, G, J, length), kept.unsqueeze(3), alpha=length * G)
    row = row.flatten(2)[..., :num_keys]
    k, v = (F.embedding(row, table) for table in part.rows)
    return F.scaled_dot_product_attention(q.reshape(B, J, -1, D), k, v).reshape(q.shape)


@lru_cache(maxsize=16)
def rows(B: int, K: int, G: int, J: int, length: int) -> Int[Tensor, "B J 1 length"]:
    """Where the first block's keys stand, for each choice, among the rows of a cache [B K G]."""
    sequence, choice = torch.arange(B)[:, None, None, None], torch.arange(J)[:, None, None]
    return (sequence * K + torch.arange(length)) * G + choice // (J // G)
