"""Selected attention in both loop orders against the reference."""

import pytest
import torch
from kernel_inputs import DEVICE, heads
from torch import Tensor

from nsa import blocks, kernels, reference
from nsa.config import NSAConfig
from nsa.kernels import selected
from nsa.kernels.block_order import inverted_lists
from nsa.kernels.block_order import op as block_order
from nsa.testing import assert_no_worse, poisoned_empty


def config(length: int, n: int, causal: bool = True) -> NSAConfig:
    return NSAConfig(
        compress_block_size=1, compress_block_sliding_stride=1, selection_block_size=length,
        num_selected_blocks=n, causal=causal,
    )  # fmt: skip


def random_blocks(B: int, T: int, index_heads: int, cfg: NSAConfig) -> Tensor:
    """Some of the blocks a token may keep, with empty slots; token 3 keeps nothing."""
    S = blocks.num_selection_blocks(T, cfg)
    kept = reference.top_blocks(torch.rand(B, T, index_heads, S, device=DEVICE), cfg)
    kept = kept.masked_fill(torch.rand(kept.shape, device=DEVICE) < 0.2, -1)
    kept[:, 3:4] = -1
    pushed = kept.masked_fill(kept < 0, S).sort(-1).values
    return pushed.masked_fill(pushed == S, -1)


CASES = {  # B, T, H, G, D, Dv, index heads, config
    "one token": (1, 1, 2, 1, 16, 16, 1, config(16, 3)),
    "17 tokens, D 8": (2, 17, 4, 2, 8, 8, 2, config(4, 3)),
    "64 tokens, R 3, D 24": (1, 64, 3, 1, 24, 16, 1, config(16, 2)),
    "100 tokens, R 4, Dv 32": (1, 100, 4, 1, 16, 32, 1, config(32, 3)),
    "33 tokens, R 16": (1, 33, 16, 1, 16, 16, 1, config(16, 2)),
    "acausal, blocks of 12": (1, 70, 4, 2, 16, 16, 2, config(12, 3, causal=False)),
    "each head its own": (1, 70, 4, 2, 16, 16, 4, config(16, 3)),
    "more slots than blocks": (1, 40, 2, 1, 16, 16, 1, config(16, 7)),
    "nothing to select": (1, 20, 2, 1, 16, 16, 1, config(16, 0)),
    "37 tokens, D 192, Dv 128": (1, 37, 2, 1, 192, 128, 1, config(16, 2)),
}


@pytest.mark.parametrize("tile_order", [True, False], ids=["tile order", "block order"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_selected(case, tile_order, monkeypatch):
    B, T, H, G, D, Dv, index_heads, cfg = case
    monkeypatch.setattr(selected, "prefers_tile_order", lambda *sizes: tile_order)
    indices = random_blocks(B, T, index_heads, cfg)
    assert_no_worse(
        lambda q, k, v: kernels.selected_attention(q, k, v, indices, cfg),
        lambda q, k, v: reference.selected_attention(q, k, v, indices, cfg),
        *heads(B, T, T, H, G, D, Dv),
    )


@pytest.mark.parametrize("partial_bytes", [1, 140 * 4 * 16 * 4])
@pytest.mark.parametrize("index_heads", [1, 2])
def test_chunks_items_and_gates(index_heads, partial_bytes, monkeypatch):
    """Chunks of tokens or of whole heads, lists of several items; gates get a factor's gradient."""
    monkeypatch.setattr(inverted_lists, "PARTIAL_BYTES", (partial_bytes, partial_bytes))
    monkeypatch.setattr(inverted_lists, "ITEM_ROWS", 1)
    cfg = config(72, 2)
    indices = random_blocks(1, 140, index_heads, cfg)
    gates = torch.ones(indices.shape, dtype=torch.float64, device=DEVICE)
    assert_no_worse(
        lambda q, k, v, g: kernels.selected_attention(q, k, v, indices, cfg, g),
        lambda q, k, v, g: reference.selected_attention(q, k, v, indices, cfg, g),
        *heads(1, 140, 140, 2, 1, 16, 16),
        gates,
        repeat=True,
    )


@pytest.mark.parametrize(
    ("R", "dense"), [(1, (0, 0)), (1, (0, 1)), (1, (1, 0)), (3, (2, 1)), (3, (1, 3))]
)
def test_dense_blocks_have_no_partial_results(R, dense, monkeypatch):
    """The slots of other blocks are written, and no others are read: memory is poisoned."""
    (initial, local), T, cfg = dense, 75, config(12, 4)
    indices = random_blocks(1, T, 2, cfg)
    q, k, v = (x.float() for x in heads(1, T, T, 2 * R, 2, 16, 16))
    parts, merge = [], block_order.merge_kernel

    class Recorded:
        def __getitem__(self, grid):
            def launch(q, k, v, starts, part, *rest, **sizes):
                parts.append(part.clone())
                merge[grid](q, k, v, starts, part, *rest, **sizes)

            return launch

    monkeypatch.setattr(block_order, "merge_kernel", Recorded())
    with poisoned_empty():
        out, *_ = block_order.attend_blocks(q, k, v, indices, None, None, 12, True, initial, local)
    torch.testing.assert_close(out, reference.selected_attention(q, k, v, indices, cfg))
    own = torch.arange(T, device=DEVICE)[:, None, None] // 12
    dense_slots = (indices[0] < initial) | (indices[0] > own - local)
    expected = (indices[0] >= 0) & ~dense_slots  # [T, J, N]
    written = parts[0].view(2, T, 4, R * 16).isfinite().all(-1)
    assert torch.equal(written.transpose(0, 1), expected)


def test_which_blocks_are_dense():
    cfg = config(160, 2)
    assert selected.dense_blocks(cfg, 160, 128) == (1, 2)
    assert selected.dense_blocks(cfg, 80, 128) == (2, 4), "in parts"
    assert selected.dense_blocks(cfg, 160, 256) == (0, 0), "not where it does not pay"
    assert selected.dense_blocks(config(160, 2, causal=False), 160, 128) == (0, 0)


def test_a_long_block_is_split():
    cfg = config(160, 2)
    indices = random_blocks(1, 200, 1, cfg)
    gates = torch.ones(indices.shape, dtype=torch.float64, device=DEVICE)
    assert_no_worse(
        lambda q, k, v, g: kernels.selected_attention(q, k, v, indices, cfg, g),
        lambda q, k, v, g: reference.selected_attention(q, k, v, indices, cfg, g),
        *heads(1, 200, 200, 1, 1, 16, 16),
        gates,
    )


def test_the_table_takes_tiles_for_short_sequences():
    assert selected.prefers_tile_order(1024, config(16, 8))
    assert not selected.prefers_tile_order(65536, config(64, 16))


def test_heads_wider_than_256_are_refused():
    q, k, v = (x.float() for x in heads(1, 20, 20, 1, 1, 260, 16))
    indices = random_blocks(1, 20, 1, config(16, 1))
    with pytest.raises(ValueError, match="260 is above 256"):
        kernels.selected_attention(q, k, v, indices, config(16, 1))


@pytest.mark.parametrize(("length", "times_kept"), [(64, 4), (32, 4), (16, 16)])
def test_short_blocks_prefer_tiles_for_longer(length, times_kept):
    cfg = config(length, 64)
    last = times_kept * 64 * length
    assert selected.prefers_tile_order(last, cfg) and not selected.prefers_tile_order(last + 1, cfg)


CHUNKS = {  # partial bytes: heads of a chunk, tokens of it, chunks
    1: (1, 64, 24),
    200 * 3 * 2 * 16 * 2: (1, 200, 6),
    4 * 200 * 3 * 2 * 16 * 2: (3, 200, 2),
    2**30: (6, 200, 1),
}


@pytest.mark.parametrize("partial_bytes", CHUNKS)
def test_every_slot_is_in_one_chunk(partial_bytes, monkeypatch):
    monkeypatch.setattr(inverted_lists, "PARTIAL_BYTES", (partial_bytes, partial_bytes))
    q = torch.empty(2, 200, 6, 16, dtype=torch.float16, device=DEVICE)
    indices = torch.empty(2, 200, 3, 3, dtype=torch.int32, device=DEVICE)
    plan = inverted_lists.plan_work(q, indices, 16, 16)
    assert (plan.heads, plan.tokens, plan.chunks) == CHUNKS[partial_bytes]
    met = torch.zeros(6, 200)
    for chunk in inverted_lists.chunks_of(plan, 6, 200):
        heads = met[chunk.first_head : chunk.first_head + chunk.heads]
        heads[:, chunk.first_token : chunk.first_token + chunk.tokens] += 1
    assert (met == 1).all()


@pytest.mark.parametrize("num_tokens", [300, 2**15 - 1, 2**15])  # 16-bit keys, twice; 32-bit keys
def test_a_list_holds_its_slots_in_order(num_tokens):
    length = 8 if num_tokens == 300 else 1
    q = torch.empty(1, num_tokens, 1, 16, dtype=torch.float16, device=DEVICE)
    num_blocks = -(-num_tokens // length)
    indices = torch.randint(num_blocks, (1, num_tokens, 1, 2), device=DEVICE, dtype=torch.int32)
    indices[0, ::5, 0, 1] = -1
    plan = inverted_lists.plan_work(q, indices, length, 16)
    slots, starts = inverted_lists.sort_slots(indices, plan, num_blocks)
    assert plan.chunks == 1 and starts.numel() == num_blocks + 1
    listed = slots[: starts[-1]].long()
    block = indices.flatten()[listed]
    assert (block == torch.arange(num_blocks, device=DEVICE).repeat_interleave(starts.diff())).all()
    assert ((listed.diff() > 0) | (block.diff() > 0)).all()
    assert starts[0] == 0 and starts[-1] == (indices >= 0).sum()


def test_every_list_has_an_item_that_writes_its_block(monkeypatch):
    """An empty one, too, but none of the head that the last chunk lacks."""
    monkeypatch.setattr(inverted_lists, "PARTIAL_BYTES", (12000, 12000))
    monkeypatch.setattr(inverted_lists, "ITEM_ROWS", 1)
    q = torch.empty(1, 80, 3, 16, dtype=torch.float16, device=DEVICE)
    indices = torch.zeros(1, 80, 3, 2, dtype=torch.int32, device=DEVICE)  # all keep block 0
    indices[..., 1] = -1
    plan = inverted_lists.plan_work(q, indices, 16, 16)
    assert (plan.heads, plan.chunks, plan.lists, plan.all_lists) == (2, 2, 10, 15)
    lists = inverted_lists.sort_slots(indices, plan, 5)
    work = inverted_lists.cut_items(*lists, plan, 16, causal=True)
    items = work.ends.diff(prepend=work.ends.new_zeros(2, 1))
    assert items.tolist() == [[2, 1, 1, 1, 1] * 2, [2, 1, 1, 1, 1] + [0] * 5]
    assert work.item_lists[0, :12].tolist() == [0, 0, 1, 2, 3, 4, 5, 5, 6, 7, 8, 9]
    assert work.shared_ends[:, -1].tolist() == [4, 2]


def test_too_many_slots_are_refused():
    q = torch.empty(1, device=DEVICE).expand(1, 2**20, 16, 16)
    indices = torch.empty(1, dtype=torch.int32, device=DEVICE).expand(1, 2**20, 16, 128)
    with pytest.raises(ValueError, match="smaller micro-batch"):
        inverted_lists.plan_work(q, indices, 64, 16)
