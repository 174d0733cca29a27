"""Attention of tokens that come after others: keys and values of the others are in a cache.

An empty cache is filled by the layer's own forward pass over the whole prompt; later tokens, one or
many, attend to the cache. Both give what one forward pass over all tokens would, without gradients.
"""

from typing import Any

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from nsa import blocks, cpu_step, ops, reference
from nsa.backends import BACKENDS
from nsa.cache import LayerCache, recall
from nsa.config import NSAConfig
from nsa.heads import Branches, Heads
from nsa.rotary import frequencies, rotate
from nsa.selection import control_blocks


def make_room(cache: LayerCache, num_new: int, *, causal: bool) -> None:
    """Raises ValueError for a layer whose queries would see tokens that are still to come."""
    if not causal:
        raise ValueError("causal=False: a cache is for layers whose queries see no later token")
    if cache.longest + num_new > cache.capacity:
        cache.reserve(max(cache.longest + num_new, 2 * cache.capacity))


@torch.no_grad()
def sparse_attention(
    attn: Any,
    tokens: Float[Tensor, "B n M"],
    cache: LayerCache,
    counts: Int[Tensor, " B"] | None = None,
) -> Float[Tensor, "B n H D"]:
    """The gated sum of the branches for tokens after those of the cache, which takes them in."""
    if not cache.longest:
        make_room(cache, tokens.shape[1], causal=attn.cfg.causal)
        heads = attn.split_heads(tokens)
        x = attn.compress_and_rotate(heads)
        remember(attn, cache, heads, (x.k_slc, x.v_slc, x.k_win, x.v_win), counts)
        write_compressed(cache, x.k_cmp, x.v_cmp)
        cache.advance(tokens.shape[1], counts)
        return attn.gated_sum(x)
    if attn.selection not in ("learned", "none"):
        return gated_sum(attn, tokens, cache, counts)
    if cpu_step.takes(tokens, counts, backend=attn.backend):
        make_room(cache, 1, causal=attn.cfg.causal)
        return cpu_step.sparse_attention(attn, tokens, cache)
    if BACKENDS[attn.backend].cached_attention is not None:
        make_room(cache, tokens.shape[1], causal=attn.cfg.causal)
        return attend_by_kernels(attn, attn.split_heads(tokens), cache, counts)
    return gated_sum(attn, tokens, cache, counts)


def gated_sum(
    attn: Any, tokens: Float[Tensor, "B n M"], cache: LayerCache, counts: Int[Tensor, " B"] | None
) -> Float[Tensor, "B n H D"]:
    """`sparse_attention` by the reference."""
    compressed, selected, sliding, gates, _ = sparse_branches(attn, tokens, cache, counts)
    return ops.combine(gates, compressed, selected, sliding)


LAUNCH_BYTES = 2**30  # that decode kernels keep of the queries of one launch, about


def most_tokens(q: Float[Tensor, "B n H D"], cache: LayerCache) -> int:
    """How many tokens of each sequence one launch of decode kernels takes.

    They store every query's scores of all compressed keys, and three branches so far, in float32:
    of a whole prompt that would be T x C numbers. More tokens a launch than fill a GPU (64 do) save
    launches, nothing else.
    """
    B, _, H, D = q.shape
    C = cache["compressed"].k.shape[1]
    return max(1, LAUNCH_BYTES // (4 * B * H * (C + 3 * D)))


def attend_by_kernels(
    attn: Any, heads: Heads, cache: LayerCache, counts: Int[Tensor, " B"] | None
) -> Float[Tensor, "B n H D"]:
    """`sparse_attention` by the backend's own decode kernels; the host never waits for them."""
    num_new, step = heads.q.shape[1], BACKENDS[attn.backend]
    if num_new > (most := most_tokens(heads.q, cache)):
        return attend_in_chunks(attn, heads, cache, counts, most)
    assert step.cached_attention
    if num_new == 1 and counts is None:
        positions = cache.lengths[:, None]
        q_rot, window = append_one_token(attn, heads, cache)
    else:
        positions = cache.positions(num_new)
        q_rot, window = append_tokens(attn, heads, cache, positions, counts)
    kept, (mem_k, mem_v) = list(cache["compressed"]), attn.memory(heads.q)
    out, _ = step.cached_attention(
        heads.q, q_rot, heads.gates, (kept[0], kept[-1]), tuple(cache["selected"]), tuple(window),
        positions, cfg=attn.cfg, mem_k=mem_k, mem_v=mem_v,
        shared=attn.shared_selection, compressed_output=attn.compressed_output,
    )  # fmt: skip
    cache.advance(num_new, counts)
    return out


def append_one_token(
    attn: Any, heads: Heads, cache: LayerCache
) -> tuple[Float[Tensor, "B 1 H D"], list[Float[Tensor, "B ring G D"]]]:
    """One token of each sequence enters the cache.  Rotated queries, and the ring of the window."""
    step, parts = BACKENDS[attn.backend], {name: list(part) for name, part in cache.parts.items()}
    assert step.append_token and step.append_block
    networks = [n for n in (attn.compress_k, attn.compress_v) if n is not None]
    pools = [network.pooling() for network in networks]
    q_rot, block = step.append_token(
        heads.q, heads[1:7], frequencies(attn.rotary, heads.q.device),
        cache.lengths, parts, attn.cfg, pools=() if None in pools else pools,
    )  # fmt: skip
    if block:
        folded = [network(x) for network, x in zip(networks, block, strict=True)]
        step.append_block(folded, parts["compressed"], cache.lengths, attn.cfg)
    return q_rot, parts["window"]


def append_tokens(
    attn: Any,
    heads: Heads,
    cache: LayerCache,
    positions: Int[Tensor, "B n"],
    counts: Int[Tensor, " B"] | None,
) -> tuple[Float[Tensor, "B n H D"], list[Float[Tensor, "B ring G D"]]]:
    """Several tokens enter the cache.  Rotated queries, and a ring that holds all their windows."""
    angles = attn.rotary.angles_at(positions)
    k_win = rotate(heads.k_win, angles)
    num_new = positions.shape[1]
    slots = blocks.ring_positions(
        cache.lengths + num_new, attn.cfg.sliding_window_size + num_new - 1
    )
    window = [
        recall(ring, x, cache.lengths, slots)
        for ring, x in zip(cache["window"], (k_win, heads.v_win), strict=True)
    ]
    compress_whole_blocks(attn, cache, heads)
    rotated = (rotate(heads.k_slc, angles), heads.v_slc, k_win, heads.v_win)
    remember(attn, cache, heads, rotated, counts)
    return rotate(heads.q, angles), window


def attend_in_chunks(
    attn: Any, heads: Heads, cache: LayerCache, counts: Int[Tensor, " B"] | None, most: int
) -> Float[Tensor, "B n H D"]:
    """`attend_by_kernels`, at most so many tokens at a time."""
    outs = []
    for first in range(0, heads.q.shape[1], most):
        part = Heads(*(x[:, first : first + most] for x in heads))
        size = part.q.shape[1]
        some = None if counts is None else (counts - first).clamp(0, size)
        outs.append(attend_by_kernels(attn, part, cache, some))
    return torch.cat(outs, dim=1)


@torch.no_grad()
def sparse_branches(
    attn: Any,
    tokens: Float[Tensor, "B n M"],
    cache: LayerCache,
    counts: Int[Tensor, " B"] | None = None,
) -> Branches:
    """`SparseAttention.branches` of tokens after those of the cache, which takes them in."""
    num_new, cfg = tokens.shape[1], attn.cfg
    make_room(cache, num_new, causal=attn.cfg.causal)
    heads = attn.split_heads(tokens)
    positions = cache.positions(num_new)
    angles = attn.rotary.angles_at(positions)
    q, q_rot = heads.q, rotate(heads.q, angles)
    k_win, v_win = rotate(heads.k_win, angles), heads.v_win
    sliding = attend_to_window(q_rot, k_win, v_win, cache, cfg)
    compress_whole_blocks(attn, cache, heads)
    rotated = (rotate(heads.k_slc, angles), heads.v_slc, k_win, v_win)
    remember(attn, cache, heads, rotated, counts)
    cache.advance(num_new, counts)

    num_tokens = cache.longest
    C = blocks.num_compress_blocks(num_tokens, cfg)
    kept = [x[:, :C] for x in cache["compressed"]]
    k_cmp, v_cmp = kept[0], kept[-1]  # where only the lse counts, values do not matter
    at = {"positions": positions, "num_tokens": num_tokens}
    compressed, lse = reference.compressed_attention(q, k_cmp, v_cmp, cfg, *attn.memory(q), **at)
    if not attn.compressed_output:
        compressed = torch.zeros_like(q)
    if not cfg.num_selected_blocks:
        indices = reference.select_blocks(q, k_cmp, lse, cfg, attn.shared_selection, **at)
        return Branches(compressed, torch.zeros_like(q), sliding, heads.gates, indices)
    k_slc, v_slc = (x[:, :num_tokens] for x in cache["selected"])
    indices = control_blocks(attn, q_rot, k_slc, positions=positions)
    if indices is None:
        indices = reference.select_blocks(q, k_cmp, lse, cfg, attn.shared_selection, **at)
    selected = reference.selected_attention(q_rot, k_slc, v_slc, indices, cfg, positions=positions)
    return Branches(compressed, selected, sliding, heads.gates, indices)


def attend_to_window(
    q: Float[Tensor, "B n H D"],
    k: Float[Tensor, "B n G D"],
    v: Float[Tensor, "B n G D"],
    cache: LayerCache,
    cfg: NSAConfig,
) -> Float[Tensor, "B n H D"]:
    """The window of new tokens, which the ring does not hold yet."""
    positions = cache.positions(q.shape[1])
    held = blocks.ring_positions(cache.lengths, cfg.sliding_window_size)
    old_k, old_v = cache["window"]
    return reference.sliding_window_attention(
        q, torch.cat([old_k, k], 1), torch.cat([old_v, v], 1), cfg,
        positions=positions, key_positions=torch.cat([held, positions], dim=1),
    )  # fmt: skip


def remember(
    attn: Any,
    cache: LayerCache,
    heads: Heads,
    rotated: tuple[Tensor, Tensor, Tensor, Tensor],
    counts: Int[Tensor, " B"] | None,
) -> None:
    """Put new tokens into the parts that hold tokens; the cache does not count them yet."""
    k_slc, v_slc, k_win, v_win = rotated
    num_new = k_slc.shape[1]
    after = cache.lengths + (num_new if counts is None else counts)
    if attn.cfg.num_selected_blocks:
        cache.write("selected", (k_slc, v_slc), cache.positions(num_new))
    cache.push("window", (k_win, v_win), after)
    cache.push("tail", (heads.k_cmp, heads.v_cmp), after)


def write_compressed(
    cache: LayerCache, k_cmp: Float[Tensor, "B C G D"], v_cmp: Float[Tensor, "B C G D"]
) -> None:
    """The first blocks of an empty cache; those with padding in them are rewritten once whole."""
    for kept, x in zip(cache["compressed"], (k_cmp, v_cmp), strict=False):
        kept[:, : x.shape[1]] = x


def compress_whole_blocks(attn: Any, cache: LayerCache, heads: Heads) -> None:
    """Compress the blocks that end among new tokens, which the ring does not hold yet.

    As many are computed for every sequence. Those that are not whole get a place that no query
    sees before it is written again.
    """
    cfg, num_new = attn.cfg, heads.q.shape[1]
    first = blocks.num_compress_blocks_at(cache.lengths, cfg)
    if first.device.type == "cpu":  # where a look at the lengths makes nobody wait
        most = int((blocks.num_compress_blocks_at(cache.lengths + num_new, cfg) - first).max())
    else:
        most = -(-num_new // cfg.compress_block_sliding_stride)
    if not most:
        return
    c = first[:, None] + torch.arange(most, device=first.device)
    wanted = blocks.compress_block_tokens(c, cfg)  # [B most l]
    new = (heads.k_cmp, heads.v_cmp)
    networks = (attn.compress_k, attn.compress_v)
    compressed = []
    for ring, x, network in zip(cache["tail"], new, networks, strict=False):
        tokens = recall(ring, x, cache.lengths, wanted.flatten(1))
        tokens = rearrange(tokens, "B (c l) G D -> (B c) l G D", c=most)
        assert network is not None
        compressed.append(rearrange(network(tokens), "(B c) 1 G D -> B c G D", c=most))
    last = cache["compressed"].k.shape[1] - 1
    cache.write("compressed", compressed, c.clamp(max=last))
