"""One token of each sequence against a cache in plain PyTorch, where the host knows the lengths.

That is so on a CPU. There each small operation costs as much as its arithmetic, so that a step has
to do with few: with lengths at hand it slices what a query sees, and has no masks. Sequences of the
same length go together, others one by one. Letters as in `nsa.reference`; the token is number t.
"""

from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from nsa import blocks, reference
from nsa.cache import KeysValues, LayerCache
from nsa.config import NSAConfig
from nsa.heads import Heads
from nsa.importance import RULES
from nsa.rotary import Rotary

Parts = dict[str, KeysValues]


def one_token(attn: Any, heads: Heads, cache: LayerCache) -> Float[Tensor, "B 1 H D"]:
    """The gated sum of the branches for a token a sequence, which the cache takes in."""
    lengths = cache.lengths.tolist()
    if min(lengths) == max(lengths):
        out = attend(attn, heads, cache.parts, lengths[0])
    else:
        outs = []
        for b, t in enumerate(lengths):
            parts = {name: part.of_row(b) for name, part in cache.parts.items()}
            outs.append(attend(attn, Heads(*(x[b : b + 1] for x in heads)), parts, t))
        out = torch.cat(outs)
    cache.advance(1)
    return out


def attend(attn: Any, heads: Heads, parts: Parts, t: int) -> Float[Tensor, "B 1 H D"]:
    """`one_token` of sequences that all have t tokens in these parts."""
    cfg, G = attn.cfg, attn.kv_heads
    q_rot = remember(attn, heads, parts, t)
    compressed, probs, scores = attend_compressed(attn, heads.q, parts, t)
    width = min(t + 1, cfg.sliding_window_size)
    branches = [compressed, torch.zeros_like(q_rot), dense(q_rot, parts["window"], width)]
    if cfg.num_selected_blocks:
        own = t // cfg.selection_block_size
        if own < cfg.num_selected_blocks:  # every block is kept
            branches[1] = dense(q_rot, parts["selected"], t + 1)
        else:
            J = G if attn.shared_selection else attn.heads
            importance = block_importance(probs, scores, own, J, cfg)
            branches[1] = attend_selected(q_rot, parts["selected"], keep(importance, cfg), t, cfg)
    return (heads.gates.transpose(1, 2) @ torch.stack(branches, 2)).transpose(1, 2)


def remember(attn: Any, heads: Heads, parts: Parts, t: int) -> Float[Tensor, "B H D"]:
    """The token enters all parts, and so does the compressed block that ends with it.

    Returns rotated queries.
    """
    q, k_cmp, v_cmp, k_slc, v_slc, k_win, v_win = heads[:7]
    H, G, cfg = q.shape[2], k_slc.shape[2], attn.cfg
    cos, sin = turn(t, attn.rotary)
    x = torch.cat([q, k_slc, k_win], 2)[:, 0]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    turned = (wide * cos + wide.roll(attn.dim_head // 2, -1) * sin).to(x.dtype)
    q, k_slc, k_win = turned.split([H, G, G], 1)
    if cfg.num_selected_blocks:
        parts["selected"].put(t, k_slc, v_slc[:, 0])
    parts["window"].put(t % cfg.sliding_window_size, k_win, v_win[:, 0])
    size, stride = cfg.compress_block_size, cfg.compress_block_sliding_stride
    parts["tail"].put(t % size, k_cmp[:, 0], v_cmp[:, 0])
    beyond = t + 1 - size
    if beyond >= 0 and beyond % stride == 0:
        networks = (attn.compress_k, attn.compress_v)
        block = [
            network(ring.roll(-(t + 1), 1))[:, 0]
            for network, ring in zip(networks, parts["tail"], strict=False)
        ]
        parts["compressed"].put(beyond // stride, *block)
    return q


@lru_cache(maxsize=8)
def turn(t: int, rotary: Rotary) -> tuple[Float[Tensor, " D"], Float[Tensor, " D"]]:
    """What multiplies a row at position t, and the same row with its halves exchanged."""
    angles = t * rotary.frequencies()
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos]), torch.cat([-sin, sin])


def dense(q: Float[Tensor, "B H D"], part: KeysValues, num_keys: int) -> Float[Tensor, "B H D"]:
    """Attention to the first keys and values of a part."""
    assert part.v is not None
    k, v = (x[:, :num_keys].transpose(1, 2) for x in (part.k, part.v))
    return F.scaled_dot_product_attention(q.unflatten(1, (k.shape[1], -1)), k, v).flatten(1, 2)


def attend_compressed(
    attn: Any, q: Float[Tensor, "B 1 H D"], parts: Parts, t: int
) -> tuple[Float[Tensor, "B H D"], Float[Tensor, "B G R C"], Float[Tensor, "B G R C"]]:
    """The compressed branch, its probabilities, and its scores; memory keys are in neither."""
    C = blocks.num_compress_blocks(t + 1, attn.cfg)
    k, v = (x[:, :C].transpose(1, 2) for x in (parts["compressed"].k, parts["compressed"].values))
    mem_k, mem_v = attn.memory(q)
    memories = 0
    if mem_k is not None and mem_v is not None:
        memories = mem_k.shape[1]
        k = torch.cat([mem_k.expand(len(q), -1, -1, -1), k], 2)
        v = torch.cat([mem_v.expand(len(q), -1, -1, -1), v], 2)
    rows = (q[:, 0] * q.shape[-1] ** -0.5).unflatten(1, (attn.kv_heads, -1))
    scores = rows @ k.transpose(2, 3)
    probs = scores.softmax(-1, dtype=torch.promote_types(q.dtype, torch.float32))
    out = torch.zeros_like(q[:, 0])
    if attn.compressed_output and k.shape[2]:
        out = (probs.to(v.dtype) @ v).flatten(1, 2)
    return out, probs[..., memories:], scores[..., memories:]


def block_importance(
    probs: Float[Tensor, "B G R C"],
    scores: Float[Tensor, "B G R C"],
    own: int,
    J: int,
    cfg: NSAConfig,
) -> Float[Tensor, "B J S"]:
    """`reference.block_importance` of the blocks up to the own one, by J choices."""
    C, S = scores.shape[-1], own + 1
    overlap = overlaps(S * cfg.selection_block_size, cfg, probs.dtype)[:C, :S]
    choices = [x.flatten(1, 2).unflatten(1, (J, -1)) for x in (probs, scores)]
    with reference.full_precision("cpu"):
        if cfg.importance == "probability_sum":  # as the rule has it, the probabilities at hand
            return choices[0].sum(2) @ overlap
        probs, scores = (x.to(overlap)[..., None, :] for x in choices)
        lse = scores[..., 0] - probs[..., 0].log()
        rule = RULES[cfg.importance] if isinstance(cfg.importance, str) else cfg.importance
        visible = torch.ones(1, 1, 1, 1, C, dtype=torch.bool)
        return rule(scores, lse, visible, overlap)[:, :, 0]


@lru_cache(maxsize=16)
def overlaps(num_tokens: int, cfg: NSAConfig, dtype: torch.dtype) -> Float[Tensor, "C S"]:
    """`blocks.block_overlap`, kept from step to step."""
    return blocks.block_overlap(num_tokens, cfg).to(dtype)


def keep(importance: Float[Tensor, "B J S"], cfg: NSAConfig) -> Int[Tensor, "B J N"]:
    """`reference.top_blocks` of more than n blocks, the last of them the query's own."""
    forced = forced_blocks(importance.shape[-1] - 1, cfg)
    free = cfg.num_selected_blocks - len(forced)
    others = importance.index_fill(-1, forced, float("-inf"))
    best = others.sort(dim=-1, descending=True, stable=True).indices[..., :free]
    return torch.cat([forced.expand(*best.shape[:2], -1), best], -1).sort(-1).values


@lru_cache(maxsize=16)
def forced_blocks(own: int, cfg: NSAConfig) -> Int[Tensor, " forced"]:
    """The blocks that a query keeps whatever they score, at most n."""
    rank = blocks.priority((own + 1) * cfg.selection_block_size, cfg)[-1]
    order = rank.sort(descending=True, stable=True)
    number = min(int((order.values > blocks.FREE).sum()), cfg.num_selected_blocks)
    return order.indices[:number]


def attend_selected(
    q: Float[Tensor, "B H D"],
    part: KeysValues,
    kept: Int[Tensor, "B J N"],
    t: int,
    cfg: NSAConfig,
) -> Float[Tensor, "B H D"]:
    """Attention inside the selected blocks. The last is the query's own, and ends with it."""
    B, K, G, D = part.k.shape
    length, J = cfg.selection_block_size, kept.shape[1]
    inside, row = places(B, K, G, J, length)
    num_keys = (kept.shape[2] - 1) * length + t % length + 1
    token = (kept[..., None] * length + inside).flatten(2)[..., :num_keys]
    k, v = (F.embedding(token * G + row, x.view(-1, D)) for x in (part.k, part.values))
    return F.scaled_dot_product_attention(q.unflatten(1, (J, -1)), k, v).flatten(1, 2)


@lru_cache(maxsize=16)
def places(
    B: int, K: int, G: int, J: int, length: int
) -> tuple[Int[Tensor, " length"], Int[Tensor, "B J 1"]]:
    """A block's tokens, and the row of each choice's first token in a cache [B K G]."""
    sequence, choice = torch.arange(B)[:, None, None], torch.arange(J)[:, None]
    return torch.arange(length), sequence * K * G + choice // (J // G)
