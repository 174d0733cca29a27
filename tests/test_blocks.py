"""Geometry against brute force: each function is compared with its definition, counted by hand."""

from itertools import product

import pytest
import torch

from nsa import blocks
from nsa.config import NSAConfig

LENGTHS = (1, 17, 64, 100)
SIZES = [(8, 4, 16), (32, 16, 64), (4, 4, 16), (16, 16, 16), (6, 4, 8), (7, 3, 9)]  # l, d, l'


def config(length: int, stride: int, block: int, **others) -> NSAConfig:
    return NSAConfig(
        compress_block_size=length,
        compress_block_sliding_stride=stride,
        selection_block_size=block,
        **others,
    )


def compressed_tokens(c: int, cfg: NSAConfig) -> set[int]:
    start = c * cfg.compress_block_sliding_stride
    return set(range(start, start + cfg.compress_block_size))


def block_tokens(s: int, cfg: NSAConfig) -> set[int]:
    return set(range(s * cfg.selection_block_size, (s + 1) * cfg.selection_block_size))


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_only_whole_compressed_blocks_exist(num_tokens: int, sizes: tuple[int, int, int]) -> None:
    cfg = config(*sizes)
    whole = [c for c in range(num_tokens) if max(compressed_tokens(c, cfg)) < num_tokens]
    assert blocks.num_compress_blocks(num_tokens, cfg) == len(whole)
    assert blocks.num_selection_blocks(num_tokens, cfg) == len(
        {t // cfg.selection_block_size for t in range(num_tokens)}
    )


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_overlap_counts_shared_tokens(num_tokens: int, sizes: tuple[int, int, int]) -> None:
    cfg = config(*sizes)
    overlap = blocks.block_overlap(num_tokens, cfg)
    for c, s in product(*map(range, overlap.shape)):
        shared = len(compressed_tokens(c, cfg) & block_tokens(s, cfg))
        assert overlap[c, s].item() == pytest.approx(shared / cfg.compress_block_sliding_stride)


@pytest.mark.parametrize("sizes", [s for s in SIZES if s[0] % s[1] == 0])
def test_overlap_is_equation_9(sizes: tuple[int, int, int]) -> None:
    """The paper's double sum, its indices counted from 1, where d divides l."""
    length, stride, block = sizes
    overlap = blocks.block_overlap(257, config(*sizes))
    votes = torch.zeros_like(overlap)
    num_compressed, num_blocks = votes.shape
    per_block, per_window = block // stride, length // stride
    for j, m, n in product(range(1, num_blocks + 1), range(per_block), range(per_window)):
        i = per_block * j - m - n
        if 1 <= i <= num_compressed:
            votes[i - 1, j - 1] += 1
    assert torch.equal(overlap, votes)


def test_the_papers_sizes_weigh_1_2_2_2_1() -> None:
    overlap = blocks.block_overlap(256, NSAConfig())
    assert overlap[3:8, 1].tolist() == [1, 2, 2, 2, 1]
    assert overlap[:3, 1].eq(0).all() and overlap[8:, 1].eq(0).all()


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_visibility(num_tokens: int, causal: bool) -> None:
    cfg = config(7, 3, 9, sliding_window_size=5, causal=causal)
    visible = blocks.compress_visible(num_tokens, cfg)
    for t, c in product(*map(range, visible.shape)):
        assert visible[t, c] == (max(compressed_tokens(c, cfg)) <= t or not causal)
    window = blocks.sliding_window(num_tokens, cfg)
    eligible = blocks.eligible(num_tokens, cfg)
    own = blocks.own_block(num_tokens, cfg)
    for t in range(num_tokens):
        seen = {s for s in range(num_tokens) if window[t, s]}
        after = 0 if causal else 4
        assert seen == set(range(max(0, t - 4), min(num_tokens, t + after + 1)))
        assert t in block_tokens(int(own[t]), cfg)
        for s in range(eligible.shape[1]):
            assert eligible[t, s] == (min(block_tokens(s, cfg)) <= t or not causal)
    assert torch.equal(blocks.causal(num_tokens), torch.ones(num_tokens, num_tokens).tril().bool())


def test_only_queries_that_keep_the_short_last_block_lack_its_tokens() -> None:
    cfg = config(4, 1, 9, num_selected_blocks=1, causal=False)
    assert blocks.keys_per_query(15, cfg)["selected"].tolist() == [9] * 9 + [6] * 6
    every = config(4, 1, 9, num_selected_blocks=2, causal=False)
    assert blocks.keys_per_query(15, every)["selected"].tolist() == [15] * 15


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("initial", "local"), [(1, 2), (0, 1), (2, 3)])
def test_priority(initial: int, local: int, causal: bool) -> None:
    cfg = config(4, 2, 8, num_initial_blocks=initial, num_local_blocks=local, causal=causal)
    priority = blocks.priority(60, cfg)
    assert priority.shape == (60, 8)
    for t, s in product(range(60), range(8)):
        own = t // 8
        if s == own:
            rank = blocks.OWN
        elif s > own and causal:
            rank = blocks.INELIGIBLE
        elif s < initial:
            rank = blocks.INITIAL
        elif own - local < s < own:
            rank = blocks.LOCAL
        else:
            rank = blocks.FREE
        assert priority[t, s] == rank
    assert blocks.OWN > blocks.INITIAL > blocks.LOCAL > blocks.FREE > blocks.INELIGIBLE


@pytest.mark.parametrize("causal", [True, False])
def test_selected_tokens(causal: bool) -> None:
    """An empty slot selects nothing, and a short last block ends with the sequence."""
    cfg = config(4, 2, 8, causal=causal)
    num_tokens, num_blocks = 20, 3
    indices = torch.full((2, num_tokens, 2, 3), -1, dtype=torch.int32)
    for b, t, g in product(range(2), range(num_tokens), range(2)):
        chosen = torch.randperm(num_blocks)[: (b + t + g) % 4].sort().values
        indices[b, t, g, : len(chosen)] = chosen
    selected = blocks.selected_tokens(indices, num_tokens, cfg)
    assert selected.shape == (2, num_tokens, 2, num_tokens)
    for b, t, g, s in product(range(2), range(num_tokens), range(2), range(num_tokens)):
        hit = s // 8 in indices[b, t, g].tolist()
        assert selected[b, t, g, s] == (hit and (s <= t or not causal))


def test_windows_are_the_tokens_of_compressed_blocks() -> None:
    cfg, x = config(7, 3, 9), torch.randn(2, 20, 2, 4)
    windows = blocks.compress_windows(x, cfg)
    assert windows.shape == (2, 2, 5, 7, 4)
    for c in range(5):
        assert torch.equal(
            windows[:, :, c].transpose(1, 2), x[:, sorted(compressed_tokens(c, cfg))]
        )


@pytest.mark.parametrize("num_selected", [0, 3])
@pytest.mark.parametrize("num_tokens", LENGTHS)
def test_keys_per_query_are_what_the_masks_show(num_tokens: int, num_selected: int) -> None:
    cfg = config(7, 3, 9, sliding_window_size=5, num_selected_blocks=num_selected)
    best = blocks.priority(num_tokens, cfg).topk(
        min(num_selected, blocks.num_selection_blocks(num_tokens, cfg))
    )
    indices = best.indices.masked_fill(best.values == blocks.INELIGIBLE, -1).int()
    keys = blocks.keys_per_query(num_tokens, cfg)
    shown = {
        "compressed": blocks.compress_visible(num_tokens, cfg),
        "selected": blocks.selected_tokens(indices[None, :, None], num_tokens, cfg)[0, :, 0],
        "sliding": blocks.sliding_window(num_tokens, cfg),
    }
    assert keys.keys() == shown.keys()
    for branch, mask in shown.items():
        assert keys[branch].tolist() == mask.sum(-1).tolist(), branch
