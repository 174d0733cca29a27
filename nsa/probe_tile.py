"""A tile of neighbouring queries of one NSA layer: what each keeps, and where its mass lies.

All is computed by `nsa.reference` in float32, whatever the layer's backend, from the queries, keys
and values that the layer makes. Letters as in `nsa.reference`; Q queries of a tile, J index heads
(G, or H: one a query head).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nsa import blocks, reference
from nsa.attention import SparseAttention
from nsa.config import NSAConfig
from nsa.heads import Branches, Projected
from nsa.selection import control_blocks


class Tile(NamedTuple):
    """Neighbouring queries of one sequence: what each keeps, and where its mass lies."""

    cfg: NSAConfig
    num_tokens: int
    at: dict[str, Any]  # positions [1 Q], and document_starts [1 Q] of these queries, or None
    branches: Branches  # of these queries
    rank: Int[Tensor, "Q 1 S"]  # of `blocks.priority`
    kept: Bool[Tensor, "Q J S"]
    mass: Float[Tensor, "Q H S"]  # sums to 1 over blocks
    visible: Float[Tensor, "Q H"]  # mass of the tokens that the selected branch or the window reads

    @property
    def positions(self) -> Int[Tensor, "1 Q"]:
        return self.at["positions"]

    @property
    def free(self) -> Bool[Tensor, "Q 1 S"]:
        """Blocks that only their scores can bring in."""
        return self.rank == blocks.FREE

    @property
    def picks(self) -> Bool[Tensor, "Q J S"]:
        return self.kept & self.free & self.chooses

    @property
    def chooses(self) -> Bool[Tensor, "Q 1 1"]:
        """Whether a query has more blocks to keep than it may keep."""
        eligible = (self.rank != blocks.INELIGIBLE).sum(-1, keepdim=True)
        return eligible > self.cfg.num_selected_blocks

    def by_head(self, x: Float[Tensor, "Q J"]) -> Float[Tensor, "Q H"]:
        """A number an index head, as one of each query head that shares its blocks."""
        return repeat(x, "Q J -> Q (J R)", R=self.mass.shape[1] // x.shape[1])

    def top(self, worth: Float[Tensor, "Q J S"]) -> Bool[Tensor, "Q J S"]:
        """What would be kept if blocks were worth this much."""
        kept = reference.top_blocks(worth[None], self.cfg, num_tokens=self.num_tokens, **self.at)
        return as_mask(kept, worth.shape[-1])


def of_sequence(x: Projected, sequence: int) -> Projected:
    """One sequence of a batch, in float32; memory keys are those of all."""
    parts = {name: part for name, part in x._asdict().items() if part is not None}
    alone = {
        name: part if name in ("mem_k", "mem_v") else part[sequence : sequence + 1]
        for name, part in parts.items()
    }
    return x._replace(**{n: p.float() if p.is_floating_point() else p for n, p in alone.items()})


def look(layer: SparseAttention, x: Projected, positions: Int[Tensor, "1 Q"]) -> Tile:
    """What the queries at `positions` of one sequence do."""
    cfg, num_tokens = layer.cfg, x.q.shape[1]
    starts = None if x.document_starts is None else x.document_starts[:, positions[0]]
    at: dict[str, Any] = {"positions": positions, "document_starts": starts}
    branches = branches_at(layer, x, at)
    probabilities = dense_probabilities(x, at, cfg)  # [H Q K]
    num_blocks = blocks.num_selection_blocks(num_tokens, cfg)
    reads = blocks.selected_tokens(branches.block_indices, num_tokens, cfg, **at)
    reads = repeat(reads[0], "Q J K -> (J R) Q K", R=layer.heads // reads.shape[2])
    reads = reads | blocks.sliding_window(num_tokens, cfg, **at)
    return Tile(
        cfg,
        num_tokens,
        at,
        branches,
        blocks.priority(num_tokens, cfg, **at)[0][:, None],
        as_mask(branches.block_indices, num_blocks),
        sum_over_blocks(probabilities, cfg),
        rearrange((probabilities * reads).sum(-1), "H Q -> Q H"),
    )


def branches_at(layer: SparseAttention, x: Projected, at: dict[str, Any]) -> Branches:
    """`nsa.branches.attend_branches` of some queries, by the reference."""
    cfg, num_tokens, here = layer.cfg, x.q.shape[1], at["positions"][0]
    q, q_rot, gates = (each[:, here] for each in (x.q, x.q_rot, x.gates))
    compressed, lse = reference.compressed_attention(
        q, x.k_cmp, x.v_cmp, cfg, x.mem_k, x.mem_v, num_tokens=num_tokens, **at
    )
    if not layer.compressed_output:
        compressed = torch.zeros_like(q)
    kept = control_blocks(layer, q_rot, x.k_slc, **at)
    if kept is None:
        shared = layer.shared_selection
        kept = reference.select_blocks(q, x.k_cmp, lse, cfg, shared, num_tokens=num_tokens, **at)
    selected = torch.zeros_like(q)
    if cfg.num_selected_blocks:
        selected = reference.selected_attention(q_rot, x.k_slc, x.v_slc, kept, cfg, **at)
    keys = torch.arange(num_tokens, device=q.device)[None]
    sliding = reference.sliding_window_attention(
        q_rot, x.k_win, x.v_win, cfg, key_positions=keys, **at
    )
    return Branches(compressed, selected, sliding, gates, kept)


def dense_probabilities(x: Projected, at: dict[str, Any], cfg: NSAConfig) -> Float[Tensor, "H Q K"]:
    """Dense attention with the queries and keys of the selected branch."""
    scores = reference.scaled_scores(x.q_rot[:, at["positions"][0]], x.k_slc)[0]
    scores = rearrange(scores, "G R Q K -> (G R) Q K")
    if cfg.causal:
        seen = blocks.causal(scores.shape[-1], **at)
        scores = scores.masked_fill(~seen, float("-inf"))
    return scores.softmax(dim=-1)


def sum_over_blocks(
    probabilities: Float[Tensor, "H Q K"], cfg: NSAConfig
) -> Float[Tensor, "Q H S"]:
    """The mass of each selection block; the last one may be short."""
    size = cfg.selection_block_size
    missing = -probabilities.shape[-1] % size
    padded = F.pad(probabilities, (0, missing))
    return reduce(padded, "H Q (S size) -> Q H S", "sum", size=size)


def as_mask(block_indices: Int[Tensor, "1 Q J N"], num_blocks: int) -> Bool[Tensor, "Q J S"]:
    """Lists of kept blocks as a mask."""
    ones = torch.ones_like(block_indices, dtype=torch.bool)
    return blocks.per_block(block_indices, ones, num_blocks)[0]
