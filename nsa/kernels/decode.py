"""Decoding: one query of a sequence against its cache, split over many programs.

A query has no rows to fill a GPU, so its keys are cut into splits. Four launches a step:

    attend_compressed_kernel  a split of the compressed keys: scores, and softmax so far (eq. 7)
    rank_blocks_kernel        some selection blocks: eq. 8-10 from the scores
    attend_tokens_kernel      the n best blocks (eq. 11), and a split of them or of the window
    merge_kernel              the splits of every branch, and the gated sum (eq. 5)

The grid follows from the cache's size, what is read from the sequence's length, which is in device
memory: the host never waits.
Floor, in keys and values a key head: n*l' + T/d + w; scores add 2*R/D of the compressed keys.
"""

# pyright: reportCallIssue=false

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.decode_select import rank_blocks_kernel
from nsa.kernels.decode_splits import attend_compressed_kernel, attend_tokens_kernel, merge_kernel
from nsa.kernels.primitives import (
    cdiv,
    num_multiprocessors,
    operands,
    padded,
    power_of_2,
    precision,
)

KEYS = 64  # of a tile
MOST_SPLITS = 64  # of a branch
RESIDENT = 2  # programs that a multiprocessor runs side by side, each with tiles under way
SCORES = 4096  # that a program of rank_blocks_kernel holds at once, about


class Splits(NamedTuple):
    """The softmax so far of every split, by query; splits of one branch are neighbours."""

    acc: Float[Tensor, "queries splits H D"]
    m: Float[Tensor, "queries splits H"]
    norm: Float[Tensor, "queries splits H"]


class Sizes(NamedTuple):
    """What the launches of a step share."""

    queries: int
    n: int  # queries of a sequence
    H: int
    G: int
    J: int
    D: int
    compressed: int  # splits of each branch
    selected: int
    window: int

    @property
    def splits(self) -> int:
        return self.compressed + self.selected + self.window

    @property
    def heads(self) -> dict[str, Any]:
        return dict(
            H=self.H, G=self.G, D=self.D, PADDED_D=padded(self.D), KEYS=KEYS, PRECISION=precision()
        )


def num_splits(programs: int, tiles: int, device: torch.device) -> int:
    """Into how many splits to cut the keys of a query, where `programs` would run uncut.

    No more than run at once: a few programs that come after the others would double the time.
    """
    wanted = RESIDENT * num_multiprocessors(device) // programs
    return max(1, min(wanted, tiles, MOST_SPLITS))


def cut(q: Tensor, C: int, G: int, cfg: NSAConfig, *, shared: bool) -> Sizes:
    """The sizes of a step of queries [B n H D] over C compressed blocks of G key heads."""
    B, n, H, D = q.shape
    J, N, pieces = G if shared else H, cfg.num_selected_blocks, cdiv(cfg.selection_block_size, KEYS)
    return Sizes(
        B * n, n, H, G, J, D,
        compressed=num_splits(B * n * G, cdiv(C, KEYS), q.device),
        selected=num_splits(B * n * J, N * pieces, q.device) if N else 0,
        window=num_splits(2 * B * n * J, cdiv(cfg.sliding_window_size, KEYS), q.device),
    )  # fmt: skip


def attend_compressed(
    q: Tensor, kv: tuple[Tensor, Tensor], mem: tuple[Tensor | None, Tensor | None],
    positions: Tensor, splits: Splits, sizes: Sizes, cfg: NSAConfig,
) -> Float[Tensor, "queries H C"]:  # fmt: skip
    """The compressed branch's splits.  Its scores, in base 2."""
    C, mem_k, mem_v = kv[0].shape[1], *mem
    memories = 0 if mem_k is None else mem_k.shape[1]
    memory = (q, q) if mem_k is None or mem_v is None else (mem_k.contiguous(), mem_v.contiguous())
    scores = torch.empty(sizes.queries, sizes.H, C, dtype=torch.float32, device=q.device)
    attend_compressed_kernel[(sizes.queries, sizes.G, sizes.compressed)](
        q, *kv, *memory, positions, scores, *splits, sizes.n, C, sizes.splits, sizes.D**-0.5,
        **sizes.heads, SIZE=cfg.compress_block_size, STRIDE=cfg.compress_block_sliding_stride,
        MEMORIES=memories, PADDED_M=padded(memories), SPLITS=sizes.compressed,
        ROWS=padded(sizes.H // sizes.G), num_warps=4, num_stages=3,
    )  # fmt: skip
    return scores


def rank_blocks(
    scores: Tensor, positions: Tensor, splits: Splits, sizes: Sizes, num_tokens: int, cfg: NSAConfig
) -> Int[Tensor, "queries J S"]:
    """What `best_blocks` takes the highest of, for each selection block of `num_tokens` tokens."""
    S, H, J = cdiv(num_tokens, cfg.selection_block_size), sizes.H, sizes.J
    ranks = torch.empty(sizes.queries, J, S, dtype=torch.int32, device=scores.device)
    lanes = power_of_2(cfg.selection_block_size // cfg.compress_block_sliding_stride)
    rows = power_of_2(H // J)
    width = min(64, max(4, SCORES // (lanes * rows)), power_of_2(S))
    rank_blocks_kernel[(sizes.queries, J, cdiv(S, width))](
        scores, splits.m, splits.norm, positions, ranks, scores.shape[-1], S, sizes.splits,
        H=H, J=J, SIZE=cfg.compress_block_size, STRIDE=cfg.compress_block_sliding_stride,
        LENGTH=cfg.selection_block_size, INITIAL=cfg.num_initial_blocks, LOCAL=cfg.num_local_blocks,
        LOGITS=cfg.importance == "logit_mean", SPLITS=sizes.compressed,
        P=power_of_2(sizes.compressed), ROWS=rows, BLOCKS=width, LANES=lanes, num_warps=4,
    )  # fmt: skip
    return ranks


def attend_tokens(
    q_rot: Tensor, keys: Sequence[Tensor], ranks: Tensor | None,
    positions: Tensor, splits: Splits, sizes: Sizes, cfg: NSAConfig,
) -> Int[Tensor, "queries J N"]:  # fmt: skip
    """The splits of the selected and of the window branch.  The blocks that were selected.

    `keys` are k and v of the selected branch, then of the window.
    """
    N, J = cfg.num_selected_blocks, sizes.J
    S = 1 if ranks is None else ranks.shape[-1]
    indices = torch.empty(sizes.queries, J, N, dtype=torch.int32, device=q_rot.device)
    attend_tokens_kernel[(sizes.queries, J, sizes.selected + sizes.window)](
        q_rot, *keys, indices if ranks is None else ranks, indices, positions, *splits,
        sizes.n, keys[0].shape[1], keys[2].shape[1], S, sizes.compressed, sizes.splits,
        sizes.D**-0.5,
        **sizes.heads, J=J, N=N, PADDED_S=power_of_2(max(S, 16)), KEPT=power_of_2(N),
        LENGTH=cfg.selection_block_size, WINDOW=cfg.sliding_window_size,
        SELECTED_SPLITS=sizes.selected, WINDOW_SPLITS=sizes.window,
        ROWS=padded(sizes.H // J), num_warps=4 if S <= 4096 else 8, num_stages=2,
    )  # fmt: skip
    return indices


def merge(
    splits: Splits, gates: Tensor, out: Tensor, sizes: Sizes, *, compressed_output: bool
) -> None:
    """The gated sum of the branches into `out`."""
    merge_kernel[(sizes.queries, sizes.H)](
        *splits, gates, out, H=sizes.H, D=sizes.D, PADDED_D=padded(sizes.D),
        A=sizes.compressed, B=sizes.selected, C=sizes.window,
        PADDED_A=power_of_2(sizes.compressed), PADDED_B=power_of_2(sizes.selected),
        PADDED_C=power_of_2(sizes.window), COMPRESSED=compressed_output, num_warps=4,
    )  # fmt: skip


def cached_attention(
    q: Float[Tensor, "B n H D"],
    q_rot: Float[Tensor, "B n H D"],
    gates: Float[Tensor, "B n H 3"],
    compressed: tuple[Float[Tensor, "B C G D"], Float[Tensor, "B C G D"]],
    selected: tuple[Float[Tensor, "B K G D"], Float[Tensor, "B K G D"]],
    window: tuple[Float[Tensor, "B Ring G D"], Float[Tensor, "B Ring G D"]],
    positions: Int[Tensor, "B n"],
    *,
    cfg: NSAConfig,
    mem_k: Float[Tensor, "G Nm D"] | None = None,
    mem_v: Float[Tensor, "G Nm D"] | None = None,
    shared: bool = True,
    compressed_output: bool = True,
) -> tuple[Float[Tensor, "B n H D"], Int[Tensor, "B n J N"]]:
    """The gated sum of the branches for queries at `positions`, and the blocks they select.

    Every key up to a query's own is in the buffers already. The window's is a ring: token t in
    slot t % Ring, and Ring >= w + n - 1.
    """
    q, q_rot, k_cmp, v_cmp, *keys = operands(q, q_rot, *compressed, *selected, *window)
    gates, positions = gates.contiguous(), positions.contiguous()
    sizes = cut(q, k_cmp.shape[1], k_cmp.shape[2], cfg, shared=shared)
    shape = sizes.queries, sizes.splits, sizes.H
    splits = Splits(
        *(q.new_empty(s, dtype=torch.float32) for s in ((*shape, sizes.D), shape, shape))
    )
    out = torch.empty_like(q)
    with torch.cuda.device_of(q):
        scores = attend_compressed(q, (k_cmp, v_cmp), (mem_k, mem_v), positions, splits, sizes, cfg)
        ranks = None
        if cfg.num_selected_blocks:
            ranks = rank_blocks(scores, positions, splits, sizes, keys[0].shape[1], cfg)
        indices = attend_tokens(q_rot, keys, ranks, positions, splits, sizes, cfg)
        merge(splits, gates, out, sizes, compressed_output=compressed_output)
    return out, indices.unflatten(0, q.shape[:2])
