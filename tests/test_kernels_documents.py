"""Triton's kernels on documents that share a row, against the reference."""

from functools import partial

import pytest

pytest.importorskip("triton")

import torch
from kernel_inputs import DEVICE, heads, random
from torch import Tensor

from nsa import blocks, kernels, reference
from nsa.branches import gated_attention
from nsa.config import NSAConfig
from nsa.documents import document_starts
from nsa.heads import Projected
from nsa.kernels.block_order import inverted_lists
from nsa.rotary import Rotary
from nsa.testing import assert_no_worse, judge_selection, loop_order, poisoned_empty


def config(l: int = 8, d: int = 4, block: int = 16, **others) -> NSAConfig:  # noqa: E741
    sizes = dict(
        compress_block_size=l, compress_block_sliding_stride=d, selection_block_size=block,
        sliding_window_size=20, num_selected_blocks=3,
    )  # fmt: skip
    return NSAConfig(**(sizes | others))


CASES = {  # T, borders of each row in selection blocks, H, G, D, Dv, memory keys, config
    "paper, R 4": (70, [[0, 1, 3], [0, 2, 4]], 4, 1, 16, 16, 0, config()),
    "memory, R 1": (70, [[0, 2, 4], [0, 3, 4]], 2, 2, 16, 32, 3, config()),
    "small": (
        40, [[0, 1, 2]], 2, 1, 16, 16, 3, config(num_selected_blocks=2, num_local_blocks=1)
    ),
    "many, R 3": (
        50, [[*range(7)], [0, 2, 4, 9, 9, 9, 9]], 3, 1, 16, 16, 20,
        config(4, 2, 8, num_selected_blocks=2, num_local_blocks=1),
    ),
    "D 192, Dv 128": (40, [[0, 1, 2]], 2, 1, 192, 128, 3, config(num_selected_blocks=2)),
    "odd sizes": (60, [[0, 2, 3], [0, 1, 2]], 2, 1, 24, 16, 0, config(7, 3, 9)),
    "three initial": (
        90, [[0, 2, 5]], 1, 1, 16, 16, 0,
        config(num_selected_blocks=5, num_initial_blocks=3, num_local_blocks=2),
    ),
}  # fmt: skip


def starts_of(case: tuple) -> Tensor:
    borders = torch.tensor(case[1], device=DEVICE) * case[-1].selection_block_size
    return document_starts(borders, case[0])


def inputs_of(case: tuple) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
    """q, k, v; compressed keys and values; memory keys and values."""
    T, _, H, G, D, Dv, memories, cfg = case
    torch.manual_seed(0)
    C = blocks.num_compress_blocks(T, cfg)
    memory = (random(G, memories, D), random(G, memories, Dv)) if memories else ()
    B = len(case[1])
    return heads(B, T, T, H, G, D, Dv), (random(B, C, G, D), random(B, C, G, Dv)), memory


@pytest.mark.parametrize(
    "name", ["paper, R 4", "memory, R 1", "many, R 3", "odd sizes", "D 192, Dv 128"]
)
def test_compressed(name):
    case = CASES[name]
    (q, _, _), compressed, memory = inputs_of(case)
    told = {"cfg": case[-1], "document_starts": starts_of(case)}

    def op(backend, q, k, v, mem_k=None, mem_v=None):
        return backend.compressed_attention(q, k, v, mem_k=mem_k, mem_v=mem_v, **told)

    assert_no_worse(partial(op, kernels), partial(op, reference), q, *compressed, *memory)


@pytest.mark.parametrize("name", ["paper, R 4", "many, R 3", "D 192, Dv 128"])
def test_window(name):
    case = CASES[name]
    told = {"cfg": case[-1], "document_starts": starts_of(case)}
    assert_no_worse(
        partial(kernels.sliding_window_attention, **told),
        partial(reference.sliding_window_attention, **told),
        *inputs_of(case)[0],
    )


@pytest.mark.parametrize(
    ("name", "importance", "shared"),
    [
        ("many, R 3", "probability_sum", True),
        ("memory, R 1", "probability_sum", False),
        ("small", "logit_mean", True),
        ("odd sizes", "logit_mean", False),
        ("D 192, Dv 128", "probability_sum", True),
        ("three initial", "probability_sum", True),
    ],
)
def test_select(name, importance, shared):
    case = CASES[name]
    cfg = config(**{**_sizes(case[-1]), "importance": importance})
    (q, _, _), compressed, memory = inputs_of(case)
    told = {"document_starts": starts_of(case)}
    _, lse = reference.compressed_attention(q, *compressed, cfg, *memory, **told)
    verdict, want = judge_selection(
        kernels.select_blocks, q, compressed[0], lse, cfg, torch.float32, shared=shared, **told
    )
    assert verdict.ok, verdict.text
    first = told["document_starts"][..., None, None] // cfg.selection_block_size
    assert ((want < 0) | (want >= first)).all(), "no block of another document"


def _sizes(cfg: NSAConfig) -> dict:
    return dict(
        l=cfg.compress_block_size, d=cfg.compress_block_sliding_stride,
        block=cfg.selection_block_size, num_selected_blocks=cfg.num_selected_blocks,
        num_initial_blocks=cfg.num_initial_blocks, num_local_blocks=cfg.num_local_blocks,
    )  # fmt: skip


def selection(case: tuple, index_heads: int) -> Tensor:
    """Random blocks that tokens may keep, with empty slots."""
    cfg, T = case[-1], case[0]
    scores = torch.rand(
        len(case[1]), T, index_heads, blocks.num_selection_blocks(T, cfg), device=DEVICE
    )
    kept = reference.top_blocks(scores, cfg, document_starts=starts_of(case))
    kept = kept.masked_fill(torch.rand(kept.shape, device=DEVICE) < 0.2, -1)
    pushed = kept.masked_fill(kept < 0, 2**30).sort(-1).values
    return pushed.masked_fill(pushed == 2**30, -1)


@pytest.mark.parametrize(
    ("name", "index_heads", "tile_order"),
    [
        ("paper, R 4", 1, True),
        ("many, R 3", 3, True),
        ("paper, R 4", 1, False),
        ("many, R 3", 1, False),
        ("small", 2, False),
        ("three initial", 1, False),
    ],
)
def test_selected(name, index_heads, tile_order, monkeypatch):
    monkeypatch.setattr(inverted_lists, "ITEM_ROWS", 8)  # several items a list
    case = CASES[name]
    indices = selection(case, index_heads)
    told = {"cfg": case[-1], "document_starts": starts_of(case), "block_indices": indices}
    with loop_order(tile_order):
        assert_no_worse(
            partial(kernels.selected_attention, **told),
            partial(reference.selected_attention, **told),
            *inputs_of(case)[0],
        )


@pytest.mark.parametrize(
    ("name", "importance"), [("small", "probability_sum"), ("small", "logit_mean")]
)
def test_importance_at_blocks(name, importance):
    case = CASES[name]
    cfg = config(**{**_sizes(case[-1]), "importance": importance})
    (q, _, _), (k_cmp, _), memory = inputs_of(case)
    indices, told = selection(case, case[3]), {"document_starts": starts_of(case)}

    def op(backend, q, k_cmp, mem_k=None):
        _, lse = backend.compressed_attention(q, k_cmp, k_cmp, cfg, mem_k, mem_k, **told)
        return backend.selected_importance(q, k_cmp, lse, indices, cfg, mem_k, **told)

    inputs = (q, k_cmp, *memory[:1])
    assert_no_worse(partial(op, kernels), partial(op, reference), *inputs, roundings=8.0)


@pytest.mark.parametrize("tile_order", [True, False], ids=["tile order", "block order"])
@pytest.mark.parametrize("name", ["small", "D 192, Dv 128"])
def test_gated(name, tile_order):
    case = CASES[name]
    cfg, indices, starts = case[-1], selection(case, case[3]), starts_of(case)
    (q, k, v), compressed, _ = inputs_of(case)

    def op(backend, gates, q, k_cmp, v_cmp, q_rot, *kv):
        x = Projected(q, k_cmp, v_cmp, None, None, q_rot, *kv, gates, starts)
        return gated_attention(x, cfg, backend=backend, block_indices=indices)

    gates = random(*q.shape[:3], 3).sigmoid()
    inputs = gates, q, *compressed, q.flip(1), k, v, k.flip(1), v.flip(1)
    with loop_order(tile_order):
        assert_no_worse(partial(op, "triton"), partial(op, "reference"), *inputs)


def test_rotation_by_positions_in_the_document():
    starts = starts_of(CASES["paper, R 4"])
    angles = Rotary(16).angles(70, DEVICE, starts)
    assert_no_worse(
        lambda x: kernels.rotate(x, angles),
        lambda x: reference.rotate(x, angles),
        random(2, 70, 3, 16),
    )


def test_a_neighbour_changes_no_bit():
    """Whatever the other document holds: NaN-free, and not a bit of this one differs."""
    case = CASES["paper, R 4"]
    cfg, starts, indices = case[-1], starts_of(case), selection(case, 1)
    (q, k, v), compressed, _ = inputs_of(case)
    gates = random(*q.shape[:3], 3).sigmoid()
    inputs = [x.float() for x in (gates, q, *compressed, q.flip(1), k, v, k.flip(1), v.flip(1))]
    inputs = [x.contiguous() for x in inputs]
    second = (starts[0] == 16)[None]  # of row 0; row 1 has a document of its own there

    def run(scale: float) -> list[Tensor]:
        changed = []
        for x in inputs:
            x = x.clone()
            tokens = second if x.shape[1] == 70 else second[:, ::4][:, : x.shape[1]]
            x[:1][tokens] *= scale
            changed.append(x.requires_grad_())
        projected = Projected(*changed[1:4], None, None, *changed[4:], changed[0], starts)
        with loop_order(False), poisoned_empty():
            out = gated_attention(projected, cfg, backend="triton", block_indices=indices)
            dout = torch.ones_like(out)
            dout[:1][second] *= scale
            return [out, *torch.autograd.grad(out, changed, dout)]

    for a, b in zip(run(1.0), run(-2.0), strict=True):
        tokens = ~second if a.shape[1] == 70 else ~second[:, ::4][:, : a.shape[1]]
        assert torch.equal(a[:1][tokens], b[:1][tokens]) and torch.equal(a[1:], b[1:])
        assert not torch.equal(a[:1][~tokens], b[:1][~tokens])
