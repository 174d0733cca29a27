"""Choosing blocks, and importance at chosen blocks, against the reference."""

import pytest
import torch
from kernel_inputs import DEVICE, heads, random

from nsa import blocks, kernels, reference
from nsa.config import NSAConfig
from nsa.kernels.importance_gradients import importance_dk_kernel
from nsa.testing import assert_no_worse, values_and_gradients


def config(size, stride, length, n, **changes) -> NSAConfig:
    return NSAConfig(
        compress_block_size=size, compress_block_sliding_stride=stride,
        selection_block_size=length, num_selected_blocks=n, **changes,
    )  # fmt: skip


def scored(T: int, H: int, G: int, cfg: NSAConfig) -> tuple[torch.Tensor, ...]:
    """q, k_cmp and lse."""
    q, k, v = heads(1, T, blocks.num_compress_blocks(T, cfg), H, G, 16, 16)
    return q, k, reference.compressed_attention(q, k, v, cfg)[1]


CHOICES = {
    "sizes of the paper over 4": (100, 4, 2, config(8, 4, 16, 3), True),
    "one token": (1, 2, 1, config(8, 4, 16, 3), True),
    "no block has ended": (7, 2, 1, config(8, 4, 16, 3), True),
    "n below the forced set, R 3": (60, 3, 1, config(8, 4, 16, 2, num_initial_blocks=2), True),
    "acausal": (70, 2, 2, config(8, 4, 16, 3, causal=False), True),
    "each head its own": (70, 4, 2, config(8, 4, 16, 3), False),
    "mean logit": (70, 4, 2, config(8, 4, 16, 3, importance="logit_mean"), True),
    "mean logit, acausal, by head": (
        70, 2, 1, config(8, 4, 16, 3, importance="logit_mean", causal=False), False,
    ),
    "l = d = l'": (60, 2, 1, config(4, 4, 4, 5), True),
    "three strides a block, l no multiple": (70, 2, 1, config(6, 4, 12, 3), True),
    "sixteen strides a block": (70, 2, 1, config(16, 2, 32, 2), True),
    "several tiles, each spilling into the next": (100, 4, 2, config(7, 1, 8, 3), True),
    "several tiles, mean logit": (100, 4, 2, config(7, 1, 8, 5, importance="logit_mean"), True),
    "n beyond the blocks there are": (40, 2, 1, config(8, 4, 8, 9), True),
}  # fmt: skip


@pytest.mark.parametrize("choice", CHOICES.values(), ids=CHOICES)
def test_select_blocks(choice):
    """Same blocks as the reference; where scores differ by rounding alone, blocks as good."""
    T, H, G, cfg, shared = choice
    q, k, lse = scored(T, H, G, cfg)
    importance = reference.block_importance(q, k, lse, cfg, shared)
    want = reference.top_blocks(importance, cfg)
    got = kernels.select_blocks(q.float(), k.float(), lse.float(), cfg, shared)
    assert got.dtype == torch.int32 and got.shape == want.shape
    differ = (got != want).any(-1)
    assert differ.double().mean() < 0.02
    rank = blocks.priority(T, cfg, DEVICE)[:, None]
    score = torch.where(rank > blocks.FREE, 1e3 * rank, importance)[differ]
    kept = [score.gather(-1, index[differ].long().clamp_min(0)).sum(-1) for index in (got, want)]
    torch.testing.assert_close(*kept, rtol=1e-5, atol=1e-5)


def test_lower_block_wins_a_tie():
    """Equal keys give equal scores: the first blocks are kept, besides the forced ones."""
    cfg = config(4, 4, 4, 5, num_local_blocks=1)
    q, k, v = (x.float() for x in heads(1, 64, 16, 2, 1, 16, 16))
    k = torch.ones_like(k)
    lse = kernels.compressed_attention(q, k, v, cfg)[1]
    assert kernels.select_blocks(q, k, lse, cfg)[0, 63, 0].tolist() == [0, 1, 2, 3, 15]


GATHERED = {
    "shared": (3, 1, 0, config(6, 4, 12, 3), True),
    "by head, acausal, memory": (2, 1, 3, config(8, 4, 16, 2, causal=False), False),
    "mean logit": (2, 1, 2, config(8, 4, 16, 3, importance="logit_mean"), True),
}


def through_lse(ops, indices, cfg):
    """Importance at `indices` as a function of q, k_cmp and, where given, mem_k; by way of lse."""

    def values(q, k, mem_k=None):
        lse = ops.compressed_attention(q, k, k, cfg, mem_k, mem_k)[1]
        return ops.selected_importance(q, k, lse, indices, cfg, mem_k)

    return values


@pytest.mark.parametrize("case", GATHERED.values(), ids=GATHERED)
def test_selected_importance(case):
    """Values and gradients at chosen blocks; the empty slots of early tokens give 0."""
    H, G, memories, cfg, shared = case
    q, k, lse = scored(40, H, G, cfg)
    inputs = (q, k, random(G, memories, 16)) if memories else (q, k)
    indices = reference.select_blocks(q, k, lse, cfg, shared)
    indices[:, 3] = -1
    op, oracle = (through_lse(ops, indices, cfg) for ops in (kernels, reference))
    assert_no_worse(op, oracle, *inputs)


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of keys that a mask hides
@pytest.mark.parametrize("memories", [0, 2], ids=["", "memory"])
def test_gradients_cancel_where_logits_are_saturated(memories):
    """Logits of 1,000: most queries attend to one key alone, whose gradient is nearly 0.

    Gradients of the queries, and of all keys together, err at most twice as much as those of eager
    PyTorch in float32, without a margin.
    """
    generator = torch.Generator().manual_seed(0)
    cfg = config(8, 4, 16, 3)
    shapes = (1, 60, 4, 16), (1, 14, 2, 16), (2, memories, 16)
    q, k, mem_k = (torch.randn(*shape, generator=generator).to(DEVICE) for shape in shapes)
    inputs = (q * 20, k * 20, mem_k * 20) if memories else (q * 20, k * 20)
    lse = reference.compressed_attention(*inputs[:2], k, cfg)[1]
    assert 800 < lse.max() < 2000
    indices = reference.select_blocks(*inputs[:2], lse, cfg)
    op, oracle = (through_lse(ops, indices, cfg) for ops in (kernels, reference))

    def gradients(f, dtype) -> tuple[torch.Tensor, torch.Tensor]:
        _, dq, *dkeys = values_and_gradients(f, inputs, dtype)
        return dq, torch.cat([x.flatten() for x in dkeys])

    got, eager = gradients(op, torch.float32), gradients(oracle, torch.float32)
    for g, e, want in zip(got, eager, gradients(oracle, torch.float64), strict=True):
        assert (g - want).norm() <= 2 * (e - want).norm()


@pytest.mark.filterwarnings("ignore:overflow encountered in exp2")  # of keys that a mask hides
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")  # of the same keys
def test_a_sum_over_many_tokens_rounds_no_more_than_one_over_few():
    """The keys' gradient at 8192 tokens of one head, here a plain weighted sum of the queries."""
    T, D = 8192, 256
    q, dsum = torch.rand(1, T, 1, D, device=DEVICE), torch.rand(1, T, 1, 1, device=DEVICE)
    k, lse = torch.zeros(1, 2, 1, D, device=DEVICE), torch.zeros(1, T, 1, device=DEVICE)
    dk, indices = torch.empty_like(k), torch.zeros_like(dsum, dtype=torch.int32)
    importance_dk_kernel[(1,)](
        q, k, lse, None, None, None, indices, dsum, dk, T, 2, 1.0,
        H=1, G=1, J=1, D=D, N=1, SIZE=4, STRIDE=4, LENGTH=8, MEMORY=0, CAUSAL=False, LOGITS=True,
        PADDED_D=D, TOKENS=16, KEYS=16, PRECISION="ieee", num_warps=4,
    )  # fmt: skip
    want = (dsum.double() * q.double()).sum(1)[0, 0]
    torch.testing.assert_close(dk[0, 0, 0].double(), want, rtol=4 * torch.finfo().eps, atol=0)


def test_no_blocks_to_choose():
    cfg = config(8, 4, 16, 0)
    q, k, lse = (x.float() for x in scored(20, 2, 1, cfg))
    assert kernels.select_blocks(q, k, lse, cfg).shape == (1, 20, 1, 0)
