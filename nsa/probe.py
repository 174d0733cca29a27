"""What an NSA layer does with its tokens, head by head: gates, branches, and which blocks it keeps.

Looked at in tiles of neighbouring queries, spread over the sequence, so that memory grows with its
length and not with its square.

Mass is what dense attention would give the tokens, with the queries and keys of the selected
branch. A block is kept if the selected branch reads it. A pick is a kept block that is not forced:
the scores chose it. Where a query keeps all blocks there are, nothing is chosen: such queries do
not count in figures of mass, recall and picks. Letters as in `nsa.probe_tile`.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator

import torch
from einops import reduce, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from nsa import blocks
from nsa.attention import SparseAttention
from nsa.probe_tile import Tile, look, of_sequence

TILE = 64  # neighbouring queries that are looked at together
NEIGHBOURS = (16, 32, 64)  # queries whose kept blocks are counted together
BRANCHES = ("compressed", "selected", "sliding")
Figures = dict[str, Float[Tensor, "Q H"]]  # a number a query and head; NaN where there is none


@torch.no_grad()
def probe(
    layer: SparseAttention,
    tokens: Float[Tensor, "B T M"],
    num_tiles: int = 8,
    document_starts: blocks.Starts = None,
    evidence: Int[Tensor, "B T"] | None = None,
) -> dict[str, Float[Tensor, " H"]]:
    """Figures of each head, in float64 on the CPU; NaN where no query has one.

    With `evidence` they are those of the queries whose label is asked, in tiles that have any;
    only overlap_neighbours and distinct_<n> count all queries of these tiles.

    gate_<branch>            mean gate
    share_<branch>           share of the norm of what the branches add, gates included
    mass_visible             of the tokens that the selected branch or the window reads
    mass_kept                of the kept blocks
    mass_oracle, mass_recent, mass_random
                             of the best blocks by the mass of the heads that share them, of the
                             latest ones, of random ones (its expectation), forced ones included
    mass_own_oracle          of the best blocks of this head alone: what sharing costs
    recall, recall_random    share of the oracle's picks that are kept; of random ones
    overlap_neighbours       of the picks of a query and the next one (Jaccard)
    overlap_heads            of the picks of the index heads, over all pairs; NaN if there is one
    distinct_16, _32, _64    different blocks that so many neighbouring queries keep
    kept_in_window           share of kept blocks wholly inside the window, or the query's own
    picks_in_window          the same of picks: wasted, since the window reads those tokens
    distance, distance_random
                             mean distance of picks in tokens, to a block's nearest token; of all
                             blocks that could be picked
    picks_beyond_<n>         share of picks at a distance of n tokens or more
    evidence_kept, evidence_random
                             with `evidence`: how often the block with the answer is kept, and how
                             often random picks would keep it

    Args:
        layer: on any device, in any dtype that it computes in.
        tokens: its input, before the norm.
        num_tiles: tiles of `TILE` queries a sequence, evenly spread up to its end.
        document_starts: see `nsa.documents`; what is not of a query's document does not count.
        evidence: of each query the position of the token that answers it; -1: it is not asked.
    """
    x = layer.compress_and_rotate(layer.split_heads(tokens), document_starts)
    found: defaultdict[str, list[Tensor]] = defaultdict(list)
    with torch.autocast(tokens.device.type, enabled=False):
        for sequence in range(tokens.shape[0]):
            answers = None if evidence is None else evidence[sequence]
            for start in tile_starts(tokens.shape[1], num_tiles, answers):
                stop = min(start + TILE, tokens.shape[1])
                positions = torch.arange(start, stop, device=tokens.device)[None]
                tile = look(layer, of_sequence(x, sequence), positions)
                for name, values in figures_of(tile, answers).items():
                    found[name].append(values.double().cpu())
    return {name: torch.cat(values).nanmean(dim=0) for name, values in found.items()}


def tile_starts(
    num_tokens: int, num_tiles: int, evidence: Int[Tensor, " T"] | None = None
) -> list[int]:
    """Where tiles begin: multiples of `TILE`, none twice, the last whole one among them.

    With `evidence` those of the tiles that hold a query which is asked.
    """
    starts = list(range(0, max(1, num_tokens // TILE) * TILE, TILE))
    if evidence is not None:
        starts = [s for s in range(0, num_tokens, TILE) if (evidence[s : s + TILE] >= 0).any()]
    count = min(num_tiles, len(starts))
    return [starts[len(starts) * each // count - 1] for each in range(1, count + 1)]


def figures_of(tile: Tile, evidence: Int[Tensor, " T"] | None) -> Figures:
    """All figures of a tile; with `evidence` those of the queries that are asked."""
    figures = {name: values for each in FIGURES for name, values in each(tile).items()}
    if evidence is None:
        return figures
    answers = evidence[tile.positions[0]]
    asked = (answers >= 0)[:, None]
    for name in figures.keys() - OF_NEIGHBOURS:
        figures[name] = where(asked, figures[name])
    return figures | evidence_found(tile, answers)


def evidence_found(tile: Tile, answers: Int[Tensor, " Q"]) -> Figures:
    """Whether the blocks with the answers are kept, and how likely random picks keep them."""
    size = tile.cfg.selection_block_size
    block = repeat(answers.clamp(min=0) // size, "Q -> Q J 1", J=tile.kept.shape[1])
    kept = tile.kept.gather(-1, block)[..., 0].float()
    a_free_one = ratio(tile.picks.sum(-1), tile.free.sum(-1))
    free = (tile.free & tile.chooses).expand_as(tile.kept).gather(-1, block)[..., 0]
    by_chance = torch.where(free, a_free_one, kept)
    figures = {"evidence_kept": kept, "evidence_random": by_chance}
    asked = (answers >= 0)[:, None]
    return {name: tile.by_head(where(asked, values)) for name, values in figures.items()}


# The figures


def gates_and_shares(tile: Tile) -> Figures:
    gates = tile.branches.gates[0]
    outputs = torch.stack(tile.branches[:3], dim=-1)[0]  # [Q H D 3]
    norms = (gates[:, :, None] * outputs).norm(dim=2)
    shares = norms / norms.sum(-1, keepdim=True)
    by_branch = zip(BRANCHES, gates.unbind(-1), shares.unbind(-1), strict=True)
    return {
        f"{kind}_{branch}": values
        for branch, gate, share in by_branch
        for kind, values in (("gate", gate), ("share", share))
    }


def masses(tile: Tile) -> Figures:
    """What selection reads of the mass, and what other selections would."""
    shared = reduce(tile.mass, "Q (J R) S -> Q J S", "sum", J=tile.kept.shape[1])
    latest = torch.arange(shared.shape[-1], device=shared.device).expand_as(shared).float()
    own = (tile.mass * tile.top(tile.mass)).sum(-1)
    forced = tile.mass * (tile.rank > blocks.FREE)
    a_free_one = ratio(tile.picks.sum(-1), tile.free.sum(-1))  # how likely it is picked
    figures = {
        "mass_visible": tile.visible,
        "mass_kept": mass_of(tile, tile.kept),
        "mass_oracle": mass_of(tile, tile.top(shared)),
        "mass_recent": mass_of(tile, tile.top(latest)),
        "mass_random": forced.sum(-1) + (tile.mass * tile.free).sum(-1) * tile.by_head(a_free_one),
        "mass_own_oracle": own,
    }
    return {name: where(tile.chooses[..., 0], values) for name, values in figures.items()}


def mass_of(tile: Tile, kept: Bool[Tensor, "Q J S"]) -> Float[Tensor, "Q H"]:
    per_head = repeat(kept, "Q J S -> Q (J R) S", R=tile.mass.shape[1] // kept.shape[1])
    return (tile.mass * per_head).sum(-1)


def recall(tile: Tile) -> Figures:
    """Of the oracle's picks: the share that is picked, and the share of random ones."""
    shared = reduce(tile.mass, "Q (J R) S -> Q J S", "sum", J=tile.kept.shape[1])
    oracle = tile.top(shared) & tile.free & tile.chooses
    found = ratio((oracle & tile.picks).sum(-1), oracle.sum(-1))
    by_chance = where(oracle.any(-1), ratio(tile.picks.sum(-1), tile.free.sum(-1)))
    return {"recall": tile.by_head(found), "recall_random": tile.by_head(by_chance)}


def overlaps(tile: Tile) -> Figures:
    """Jaccard overlaps of picks: of a query and the next one, and of index heads."""
    picks = tile.picks
    here, after = picks[:-1], picks[1:]
    neighbours = ratio((here & after).sum(-1), (here | after).sum(-1))
    neighbours = where(tile.chooses[:-1, 0] & tile.chooses[1:, 0], neighbours)
    heads = picks.float()
    common = torch.einsum("qis,qjs->qij", heads, heads)
    count = heads.sum(-1)
    either = count[:, :, None] + count[:, None] - common
    pairs = ratio(common, either)
    own = torch.eye(pairs.shape[1], dtype=torch.bool, device=pairs.device)
    others = pairs.masked_fill(own, float("nan")).nanmean(-1)
    return {
        "overlap_neighbours": tile.by_head(neighbours),
        "overlap_heads": tile.by_head(others),
    }


def distinct(tile: Tile) -> Figures:
    """How many different blocks neighbouring queries keep; shorter tiles have none."""
    figures = {}
    for count in NEIGHBOURS:
        whole = len(tile.kept) // count * count
        together = reduce(tile.kept[:whole], "(n count) J S -> n J S", "max", count=count)
        figures[f"distinct_{count}"] = tile.by_head(together.sum(-1).float())
    return figures


def places(tile: Tile) -> Figures:
    """Where kept blocks lie: inside the window, and how far away."""
    t = tile.positions[0][:, None, None]
    size = tile.cfg.selection_block_size
    first = torch.arange(tile.kept.shape[-1], device=t.device) * size
    end = t if tile.cfg.causal else torch.full_like(t, tile.num_tokens - 1)
    last = torch.minimum(first + size - 1, end)  # that the query sees
    farthest = torch.maximum((t - first).abs(), (t - last).abs())
    inside = (farthest < tile.cfg.sliding_window_size) | (tile.rank == blocks.OWN)
    distance = torch.maximum(t - last, first - t).clamp(min=0)
    picks, free = tile.picks, tile.free & tile.chooses
    figures = {
        "kept_in_window": share(inside, tile.kept),
        "picks_in_window": share(inside, picks),
        "distance": share(distance, picks),
        "distance_random": share(distance, free),
    }
    for n in powers_of_two(size, tile.num_tokens):
        figures[f"picks_beyond_{n}"] = share(distance >= n, picks)
    return {name: tile.by_head(values) for name, values in figures.items()}


FIGURES: tuple[Callable[[Tile], Figures], ...] = (
    gates_and_shares, masses, recall, overlaps, distinct, places,
)  # fmt: skip
OF_NEIGHBOURS = {"overlap_neighbours", *(f"distinct_{count}" for count in NEIGHBOURS)}


def powers_of_two(first: int, below: int) -> Iterator[int]:
    """first, 2·first, … as long as they are below."""
    while first < below:
        yield first
        first *= 2


def share(x: Tensor, among: Bool[Tensor, "Q J S"]) -> Float[Tensor, "Q J"]:
    """The mean of x over some blocks; NaN where there is none."""
    return ratio((x * among).sum(-1), among.sum(-1))


def ratio(part: Tensor, whole: Tensor) -> Tensor:
    """NaN where the whole is 0."""
    return where(whole > 0, part / whole.clamp(min=1))


def where(holds: Tensor, values: Tensor) -> Tensor:
    """NaN where the condition does not hold."""
    return values.float().masked_fill(~holds, float("nan"))
