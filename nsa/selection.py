"""Controls: selections that nothing has learned, to compare the learned one with.

    learned  the blocks of highest importance (eq. 8-11), by `ops.select_blocks`
    random   any blocks that have begun, drawn anew for every query
    oracle   the blocks that hold most of the attention a query would pay if it saw all keys
    none     the selected branch is off

All of them keep n blocks, the forced ones first (`blocks.priority`), so that only the free choices
differ. Letters as in `nsa.reference`.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from einops import reduce
from jaxtyping import Float, Int
from torch import Tensor

from nsa import blocks, reference
from nsa.config import NSAConfig

SELECTIONS = ("learned", "random", "oracle", "none")
LOW_BITS = (1 << 32) - 1
# Not compiled: TorchInductor makes a kernel of its sort that takes minutes to compile.
top_blocks: Callable[..., Tensor] = torch.compiler.disable(reference.top_blocks)  # type: ignore


def check_selection(selection: str) -> str:
    """Raises ValueError for an unknown name."""
    if selection not in SELECTIONS:
        raise ValueError(f"selection={selection!r} must be one of {', '.join(SELECTIONS)}")
    return selection


def control_blocks(
    attn: Any,
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B K G D"],
    *,
    positions: Int[Tensor, "B T"] | None = None,
    document_starts: blocks.Starts = None,
) -> Int[Tensor, "B T J N"] | None:
    """The blocks of a `SparseAttention` whose selection is a control; None where it is learned.

    Args:
        q, k: rotated queries and keys of the selected branch.
        positions: where the queries stand; None: at each of the K tokens.
        document_starts: see `nsa.documents`.
    """
    at = {"positions": positions, "document_starts": document_starts}
    cfg, shared = attn.cfg, attn.shared_selection
    if attn.selection == "oracle":
        return oracle_blocks(q, k, cfg, shared, **at)
    if attn.selection != "random":
        return None
    seeds = torch.full((len(q),), attn.selection_seed, device=q.device)
    if attn.training:
        seeds = torch.randint(1 << 31, (len(q),), device=q.device)
    heads = k.shape[2] if shared else q.shape[2]
    return random_blocks(seeds, heads, k.shape[1], cfg, **at)


def random_blocks(
    seeds: Int[Tensor, " B"],
    heads: int,
    num_tokens: int,
    cfg: NSAConfig,
    *,
    positions: Int[Tensor, "B T"] | None = None,
    document_starts: blocks.Starts = None,
) -> Int[Tensor, "B T J N"]:
    """Blocks by numbers that depend on seed, query, head and block alone, on any device.

    Queries and blocks are counted from the start of their document.

    Args:
        seeds: one a sequence.
        heads: J, how many choose.
        num_tokens: how many tokens there are to look at.
        positions: where the queries stand; None: at each token.
    """
    t = blocks.query_positions(num_tokens, seeds.device, positions)
    j = torch.arange(heads, device=t.device)
    s = torch.arange(blocks.num_selection_blocks(num_tokens, cfg), device=t.device)
    if document_starts is not None:
        first = document_starts // cfg.selection_block_size
        t, s = t - document_starts, s - first[..., None, None]
    drawn = mixed(seeds[:, None] + mixed(t + 1))  # [B T]
    drawn = mixed(mixed(drawn[..., None] + j)[..., None] + s)  # [B T J S]
    at = {"positions": positions, "document_starts": document_starts}
    return top_blocks(drawn.double(), cfg, num_tokens=num_tokens, **at)


def mixed(x: Int[Tensor, "*N"]) -> Int[Tensor, "*N"]:
    """A hash of the low 32 bits of whole numbers: every bit depends on every other one."""
    x = x & LOW_BITS
    for _ in range(2):
        x = ((x >> 16) ^ x) * 0x45D9F3B & LOW_BITS
    return (x >> 16) ^ x


@torch.no_grad()
def oracle_blocks(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B K G D"],
    cfg: NSAConfig,
    shared: bool = True,
    *,
    positions: Int[Tensor, "B T"] | None = None,
    document_starts: blocks.Starts = None,
) -> Int[Tensor, "B T J N"]:
    """The blocks of the largest `attention_mass`."""
    at = {"positions": positions, "document_starts": document_starts}
    mass = attention_mass(q, k, cfg, shared, **at)
    return top_blocks(mass, cfg, num_tokens=k.shape[1], **at)


def attention_mass(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B K G D"],
    cfg: NSAConfig,
    shared: bool = True,
    *,
    positions: Int[Tensor, "B T"] | None = None,
    document_starts: blocks.Starts = None,
) -> Float[Tensor, "B T J S"]:
    """The probability that dense attention over all visible keys gives to each selection block.

    Summed over the query heads of a group if they share their selection. It has a score for every
    query and key: for short sequences, or a few queries at `positions`.
    """
    num_tokens = k.shape[1]
    with reference.full_precision(q.device.type):
        at_least_float32 = torch.promote_types(q.dtype, torch.float32)
        scores = reference.scaled_scores(q.to(at_least_float32), k.to(at_least_float32))
        if cfg.causal:
            seen = blocks.causal(num_tokens, q.device, positions, document_starts)
            scores = scores.masked_fill(~reference.for_all_heads(seen), float("-inf"))
        probs = scores.softmax(dim=-1)
    if shared:
        probs = reduce(probs, "B G R T K -> B G 1 T K", "sum")
    size = cfg.selection_block_size
    # Not index_add, which adds on a GPU in any order.
    whole = F.pad(probs, (0, -num_tokens % size))
    return reduce(whole, "B G R T (S size) -> B T (G R) S", "sum", size=size)
