"""The three branches and their gated sum in one op, against the reference's ops one by one."""

import jaxtyping
import pytest
import torch
from kernel_inputs import DEVICE, heads, random

from nsa import blocks, kernels, ops, reference
from nsa.branches import gated_attention
from nsa.config import NSAConfig
from nsa.heads import Projected
from nsa.kernels import selected
from nsa.testing import assert_no_worse


def config(length: int = 16, n: int = 3, **changes) -> NSAConfig:
    return NSAConfig(
        sliding_window_size=11, compress_block_size=8, compress_block_sliding_stride=4,
        selection_block_size=length, num_selected_blocks=n, **changes,
    )  # fmt: skip


CASES = {  # B, T, H, G, D, Dv, index heads, memories, config
    "one token": (1, 1, 2, 1, 16, 16, 1, 0, config()),
    "R 2, memories": (2, 33, 4, 2, 16, 16, 2, 2, config(length=8)),
    "R 3, Dv 32": (1, 45, 3, 1, 24, 32, 1, 0, config(length=8)),
    "R 2, each head its own": (1, 35, 2, 1, 16, 16, 2, 0, config(length=8)),
    "acausal": (1, 35, 2, 2, 16, 16, 2, 0, config(length=8, causal=False)),
}


@pytest.mark.parametrize("tile_order", [True, False], ids=["tile order", "block order"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_it_is_the_sum_of_the_branches(case, tile_order, monkeypatch):
    B, T, H, G, D, Dv, index_heads, memories, cfg = case
    monkeypatch.setattr(selected, "prefers_tile_order", lambda *sizes: tile_order)
    q, k_slc, v_slc = heads(B, T, T, H, G, D, Dv)
    q_rot, k_win, v_win = heads(B, T, T, H, G, D, Dv)
    _, k_cmp, v_cmp = heads(B, T, blocks.num_compress_blocks(T, cfg), H, G, D, Dv)
    memory = (random(G, memories, D), random(G, memories, Dv)) if memories else ()
    gates = torch.rand(B, T, H, 3, dtype=torch.float64, device=DEVICE)
    gates[:, ::7, 0, 1] = 0.0  # a gate that is shut
    scores = torch.rand(B, T, index_heads, blocks.num_selection_blocks(T, cfg), device=DEVICE)
    indices = reference.top_blocks(scores, cfg)

    def op(gates, q, k_cmp, v_cmp, q_rot, k_slc, v_slc, k_win, v_win, *memory):
        mem_k, mem_v = memory or (None, None)
        x = Projected(q, k_cmp, v_cmp, mem_k, mem_v, q_rot, k_slc, v_slc, k_win, v_win, gates)
        return gated_attention(x, cfg, backend="triton", block_indices=indices)

    def oracle(gates, q, k_cmp, v_cmp, q_rot, k_slc, v_slc, k_win, v_win, *memory):
        compressed, _ = reference.compressed_attention(q, k_cmp, v_cmp, cfg, *memory)
        chosen = reference.selected_attention(q_rot, k_slc, v_slc, indices, cfg)
        sliding = reference.sliding_window_attention(q_rot, k_win, v_win, cfg)
        return reference.combine(gates, compressed, chosen, sliding)

    inputs = gates, q, k_cmp, v_cmp, q_rot, k_slc, v_slc, k_win, v_win, *memory
    assert_no_worse(op, oracle, *inputs, repeat=True)


def test_a_backend_without_it_says_so():
    x, gates, lse = torch.zeros(1, 1, 1, 16), torch.zeros(1, 1, 1, 3), torch.zeros(1, 1, 1)
    indices = torch.zeros(1, 1, 1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="has no gated_attention"):
        ops.gated_attention(
            gates, x, x, x, x, lse, x, x, x, indices, x, x, config(), backend="reference"
        )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"v_slc": (1, 9, 1, 8)}, r"v_slc has shape \(1, 9, 1, 8\): it must be \(1, 9, 1, 16\)"),
        ({"v_win": (1, 9, 1, 32)}, "v_win has shape"),
        ({"q_rot": (1, 9, 1, 16)}, r"q_rot has shape .* it must be \(1, 9, 2, 16\)"),
        ({"mem_k": (1, 2, 16)}, "mem_k and mem_v come together"),
        ({"gates": (1, 9, 2, 2)}, "gates has shape"),
    ],
)
def test_shapes_that_do_not_fit_are_refused(changes, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    queries, keys, cfg = (1, 9, 2, 16), (1, 9, 1, 16), config()
    compressed = (1, blocks.num_compress_blocks(9, cfg), 1, 16)
    shapes = {
        "gates": (1, 9, 2, 3), "q": queries, "k_cmp": compressed, "v_cmp": compressed,
        "compressed": queries, "lse": queries[:3], "q_rot": queries, "k_slc": keys, "v_slc": keys,
        "k_win": keys, "v_win": keys,
    }  # fmt: skip
    tensors = {name: torch.zeros(shape) for name, shape in (shapes | changes).items()}
    indices = torch.zeros(1, 9, 1, 3, dtype=torch.int32)
    with pytest.raises(ValueError, match=message):
        ops.gated_attention(**tensors, block_indices=indices, cfg=cfg, backend="triton")


@pytest.mark.parametrize("tile_order", [True, False], ids=["tile order", "block order"])
def test_how_inputs_lie_in_memory_changes_nothing(tile_order, monkeypatch):
    """Transposed from [B, H, T, D], the layout of other attention ops."""
    monkeypatch.setattr(selected, "prefers_tile_order", lambda *sizes: tile_order)
    cfg, B, T, H, G, D = config(length=8), 1, 20, 4, 2, 16

    def transposed(x: torch.Tensor) -> torch.Tensor:
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    def results(form) -> list[torch.Tensor]:
        q_, k_, v_, k_cmp_, v_cmp_, gates_ = (form(x) for x in inputs)
        out_cmp, lse = kernels.compressed_attention(q_, k_cmp_, v_cmp_, cfg)
        indices = form(kernels.select_blocks(q_, k_cmp_, form(lse), cfg))
        out_slc = kernels.selected_attention(q_, k_, v_, indices, cfg)
        out_win = kernels.sliding_window_attention(q_, k_, v_, cfg)
        outs = [form(out) for out in (out_cmp, out_slc, out_win)]
        known = outs[0], form(lse), q_, k_, v_, indices, k_, v_
        return [
            *(out_cmp, lse, indices, out_slc, out_win),
            kernels.selected_importance(q_, k_cmp_, form(lse), indices, cfg),
            kernels.combine(gates_, *outs),
            kernels.gated_attention(gates_, q_, k_cmp_, v_cmp_, *known, cfg),
        ]

    q, k, v = (x.float() for x in heads(B, T, T, H, G, D, D))
    _, k_cmp, v_cmp = heads(B, T, blocks.num_compress_blocks(T, cfg), H, G, D, D)
    inputs = q, k, v, k_cmp.float(), v_cmp.float(), torch.rand(B, T, H, 3, device=DEVICE)
    leaves = [x.requires_grad_() for x in inputs]
    for got, want in zip(results(transposed), results(lambda x: x), strict=True):
        assert torch.equal(got, want)
        if want.requires_grad:
            upstream = torch.randn_like(want)
            there = transposed(upstream) if upstream.ndim == 4 else upstream
            grads, others = (
                torch.autograd.grad(out, leaves, dout, retain_graph=True, allow_unused=True)
                for out, dout in ((want, upstream), (got, there))
            )
            for a, b in zip(others, grads, strict=True):
                assert (a is None) == (b is None) and (a is None or torch.equal(a, b))
