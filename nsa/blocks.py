"""Where blocks begin, end and become visible: every off-by-one of the project, in one place.

Positions count from 0. Compressed block c covers tokens [c*d, c*d + l), whole blocks only;
selection block s covers [s*l', (s+1)*l'), the last one possibly cut short by the sequence's end.

Keys have a count, queries have positions. `num_tokens` is how many tokens there are to see;
queries stand at `positions` [*B T], or, in training, at each token: 0 … num_tokens - 1. While
decoding num_tokens may exceed what a sequence has so far: a causal query sees none of the rest.

Documents that share a row are told by `document_starts` [B T]: for each token, the first token of
its document. A causal query then sees nothing before that token. Documents start at multiples of l'
(`nsa.documents`), so blocks lie as they would if a document stood alone; a compressed block that
reaches across a border is seen by nobody.

Letters: B batch, T queries, K keys, G key/value heads (or H query heads), C compressed blocks,
S selection blocks, N selected blocks.
"""

from typing import no_type_check

import torch
from einops import rearrange
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nsa.config import NSAConfig

Device = torch.device | str | None
Starts = Int[Tensor, "B T"] | None  # the first token of each token's document; None: one document

# Ranks of `priority`: a higher one is kept first.
OWN, INITIAL, LOCAL, FREE, INELIGIBLE = 3, 2, 1, 0, -1


def num_compress_blocks(num_tokens: int, cfg: NSAConfig) -> int:
    """C. Only whole blocks count: a tail shorter than l is not compressed."""
    beyond_first = num_tokens - cfg.compress_block_size
    return max(0, beyond_first // cfg.compress_block_sliding_stride + 1)


def num_compress_blocks_at(num_tokens: Int[Tensor, "*B"], cfg: NSAConfig) -> Int[Tensor, "*B"]:
    """`num_compress_blocks` of many counts of tokens."""
    beyond_first = num_tokens - cfg.compress_block_size
    blocks = beyond_first.div(cfg.compress_block_sliding_stride, rounding_mode="floor") + 1
    return blocks.clamp(min=0)


def num_selection_blocks(num_tokens: int, cfg: NSAConfig) -> int:
    """S. The last block may be short."""
    return -(-num_tokens // cfg.selection_block_size)


def sees_compressed(
    t: Tensor, c: Tensor, cfg: NSAConfig, first_token: Tensor | None = None
) -> Tensor:
    """Query t sees compressed block c once its last token is there (eq. 7); always, if not causal.

    Elementwise on positions, broadcasting; this and `in_window` also serve as FlexAttention masks.
    `first_token`: of the query's document.
    """
    first = c * cfg.compress_block_sliding_stride
    sees = (first + cfg.compress_block_size - 1 <= t) | (not cfg.causal)
    return sees if first_token is None else sees & (first >= first_token)


@no_type_check  # a run-time type checker has state, which a compiled mask may not touch
def in_window(t: Tensor, s: Tensor, cfg: NSAConfig, first_token: Tensor | None = None) -> Tensor:
    """Query t sees key s in the window: 0 <= t - s < w; |t - s| < w, if not causal."""
    near = (t - s).abs() < cfg.sliding_window_size
    near = near if first_token is None else near & (s >= first_token)
    return near & (s <= t) if cfg.causal else near


def compress_block_tokens(c: Int[Tensor, "*B C"], cfg: NSAConfig) -> Int[Tensor, "*B C l"]:
    """The l tokens of each compressed block c."""
    token = torch.arange(cfg.compress_block_size, device=c.device)
    return c[..., None] * cfg.compress_block_sliding_stride + token


def query_positions(
    num_tokens: int, device: Device, positions: Int[Tensor, "*B T"] | None
) -> Int[Tensor, "*B T"]:
    """Where queries stand: at `positions`, or at each of `num_tokens` tokens."""
    return torch.arange(num_tokens, device=device) if positions is None else positions


def each_query(document_starts: Starts) -> Int[Tensor, "B T 1"] | None:
    """The first token of each query's document, to be compared with keys or blocks."""
    return None if document_starts is None else document_starts[..., None]


def first_block(document_starts: Starts, cfg: NSAConfig) -> Int[Tensor, "B T 1"] | int:
    """The selection block in which each query's document begins."""
    return 0 if document_starts is None else document_starts[..., None] // cfg.selection_block_size


def compress_visible(
    num_tokens: int,
    cfg: NSAConfig,
    device: Device = None,
    positions: Int[Tensor, "*B T"] | None = None,
    document_starts: Starts = None,
) -> Bool[Tensor, "*B T C"]:
    """`sees_compressed` of every query and compressed block."""
    t = query_positions(num_tokens, device, positions)[..., None]
    c = torch.arange(num_compress_blocks(num_tokens, cfg), device=t.device)
    return sees_compressed(t, c, cfg, each_query(document_starts))


def sliding_window(
    num_tokens: int,
    cfg: NSAConfig,
    device: Device = None,
    positions: Int[Tensor, "*B T"] | None = None,
    document_starts: Starts = None,
) -> Bool[Tensor, "*B T K"]:
    """`in_window` of every query and key."""
    t = query_positions(num_tokens, device, positions)[..., None]
    s = torch.arange(num_tokens, device=t.device)
    return in_window(t, s, cfg, each_query(document_starts))


def ring_positions(num_tokens: Int[Tensor, " B"], size: int) -> Int[Tensor, "B size"]:
    """Which token each slot of a ring holds after `num_tokens`: t lies in slot t % size.

    Negative in slots that hold none yet.
    """
    slot = torch.arange(size, device=num_tokens.device)
    newest = num_tokens[:, None] - 1
    return newest - (newest - slot) % size


def compress_windows(x: Float[Tensor, "B T G D"], cfg: NSAConfig) -> Float[Tensor, "B G C l D"]:
    """The l tokens of each compressed block, d apart, for at least l tokens (eq. 7)."""
    windows = x.unfold(1, cfg.compress_block_size, cfg.compress_block_sliding_stride)
    return rearrange(windows, "B C G D l -> B G C l D")


def block_overlap(num_tokens: int, cfg: NSAConfig, device: Device = None) -> Float[Tensor, "C S"]:
    """Tokens shared by compressed block c and selection block s, in strides: eq. 9 as a matrix."""
    d, size = cfg.compress_block_sliding_stride, cfg.selection_block_size
    c = torch.arange(num_compress_blocks(num_tokens, cfg), device=device)[:, None] * d
    s = torch.arange(num_selection_blocks(num_tokens, cfg), device=device) * size
    end = torch.minimum(c + cfg.compress_block_size, s + size)
    return (end - torch.maximum(c, s)).clamp(min=0) / d


def own_block(num_tokens: int, cfg: NSAConfig, device: Device = None) -> Int[Tensor, " T"]:
    """The selection block each token lies in."""
    return torch.arange(num_tokens, device=device) // cfg.selection_block_size


def eligible(
    num_tokens: int,
    cfg: NSAConfig,
    device: Device = None,
    positions: Int[Tensor, "*B T"] | None = None,
    document_starts: Starts = None,
) -> Bool[Tensor, "*B T S"]:
    """The selection blocks a query may keep: its document's that have begun; all, if not causal."""
    own = query_positions(num_tokens, device, positions)[..., None] // cfg.selection_block_size
    s = torch.arange(num_selection_blocks(num_tokens, cfg), device=own.device)
    return ((s <= own) & (s >= first_block(document_starts, cfg))) | (not cfg.causal)


def priority(
    num_tokens: int,
    cfg: NSAConfig,
    device: Device = None,
    positions: Int[Tensor, "*B T"] | None = None,
    document_starts: Starts = None,
) -> Int[Tensor, "*B T S"]:
    """Which blocks are kept whatever they score: OWN, then INITIAL, then the other LOCAL ones.

    Forced blocks rank above FREE ones and count towards n; INELIGIBLE blocks are never kept.
    """
    own = query_positions(num_tokens, device, positions)[..., None] // cfg.selection_block_size
    s = torch.arange(num_selection_blocks(num_tokens, cfg), device=own.device)
    before = own - s  # blocks between s and the own one
    local = (before > 0) & (before < cfg.num_local_blocks)
    initial = s - first_block(document_starts, cfg) < cfg.num_initial_blocks
    rank = torch.where(initial, INITIAL, torch.where(local, LOCAL, FREE))
    rank = rank.masked_fill(before == 0, OWN)
    may = eligible(num_tokens, cfg, device, positions, document_starts)
    return rank.masked_fill(~may, INELIGIBLE)


def causal(
    num_tokens: int,
    device: Device = None,
    positions: Int[Tensor, "*B T"] | None = None,
    document_starts: Starts = None,
) -> Bool[Tensor, "*B T K"]:
    """A query sees its own token and those of its document before it."""
    t = query_positions(num_tokens, device, positions)[..., None]
    s = torch.arange(num_tokens, device=t.device)
    return s <= t if document_starts is None else (s <= t) & (s >= document_starts[..., None])


def per_block(block_indices: Int[Tensor, "B T G N"], values: Tensor, num_blocks: int) -> Tensor:
    """Scatter one value a slot, [B T G N], to one value a block, [B T G S]; elsewhere 0.

    Empty slots (-1) land in a spare column that is cut off: they select nothing.
    """
    slots = block_indices.long().masked_fill(block_indices < 0, num_blocks)
    spread = values.new_zeros(*slots.shape[:-1], num_blocks + 1)
    return spread.scatter(-1, slots, values)[..., :num_blocks]


def selected_tokens(
    block_indices: Int[Tensor, "B T G N"],
    num_tokens: int,
    cfg: NSAConfig,
    positions: Int[Tensor, "B T"] | None = None,
    document_starts: Starts = None,
) -> Bool[Tensor, "B T G K"]:
    """The tokens that lie in a selected block and, if causal, not in the future."""
    device = block_indices.device
    chosen = per_block(
        block_indices,
        torch.ones_like(block_indices, dtype=torch.bool),
        num_selection_blocks(num_tokens, cfg),
    )
    hit = chosen[..., own_block(num_tokens, cfg, device)]
    if not cfg.causal:
        return hit
    return hit & causal(num_tokens, device, positions, document_starts).unsqueeze(-2)


def keys_per_query(
    num_tokens: int, cfg: NSAConfig, device: Device = None
) -> dict[str, Int[Tensor, " T"]]:
    """How many keys of each branch every query reads (the terms of eq. 6), memory keys aside.

    If not causal, scores decide who keeps the short last block. Its missing tokens are left out
    only for queries that keep it whatever the scores; for the others the count is a bound.
    """
    t = torch.arange(num_tokens, device=device)
    block, last_token = cfg.selection_block_size, num_tokens - 1
    horizon = t if cfg.causal else torch.full_like(t, last_token)  # the last token a query sees
    whole = (horizon + 1 - cfg.compress_block_size).div(
        cfg.compress_block_sliding_stride, rounding_mode="floor"
    )
    kept = (horizon // block + 1).clamp(max=cfg.num_selected_blocks)
    keeps_last = (t // block == horizon // block) | (kept == horizon // block + 1)
    cut = (block - 1 - horizon % block) * keeps_last  # what the last visible block lacks
    return {
        "compressed": (whole + 1).clamp(min=0),
        "selected": (kept * block - cut).clamp(min=0) if cfg.num_selected_blocks else kept,
        "sliding": torch.minimum(t + 1, torch.full_like(t, cfg.sliding_window_size))
        if cfg.causal
        else sliding_window(num_tokens, cfg, device).sum(-1),
    }
