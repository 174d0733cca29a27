"""Compressed blocks, as means and by attention pooling, against plain PyTorch."""

import pytest
import torch
from kernel_inputs import random

from nsa import kernels, pooling, reference
from nsa.config import NSAConfig
from nsa.kernels.attention_pooling import op as attention_pooling
from nsa.testing import assert_no_worse


@pytest.mark.parametrize("sizes", [(4, 2), (6, 4), (7, 3), (5, 5), (3, 1)])
@pytest.mark.parametrize("shape", [(2, 7, 1, 16), (1, 12, 2, 80), (2, 100, 3, 8)])
def test_block_means(shape, sizes):
    """Blocks that share any part of their tokens, a tail that no block covers, several tiles."""
    size, stride = sizes
    cfg = NSAConfig(
        compress_block_size=size, compress_block_sliding_stride=stride,
        selection_block_size=4 * stride if size > stride else stride,
    )  # fmt: skip
    assert_no_worse(
        lambda x: kernels.block_means(x, cfg),
        lambda x: x.unfold(1, size, stride).mean(-1),
        random(*shape),
        repeat=True,
    )


@pytest.mark.parametrize("positions", [True, False])
@pytest.mark.parametrize(
    ("shape", "sizes"),
    [
        ((2, 9, 1, 16), (4, 2)),
        ((1, 30, 2, 20), (7, 3)),
        ((2, 41, 3, 8), (5, 5)),
        ((1, 70, 1, 80), (20, 16)),
    ],
)
def test_attention_pool(shape, sizes, positions, monkeypatch):
    """Blocks as above; heads that lie apart; sums that several programs share."""
    monkeypatch.setattr(attention_pooling, "PROGRAMS", 3)
    (size, stride), (_, _, G, D) = sizes, shape
    cfg = NSAConfig(
        compress_block_size=size, compress_block_sliding_stride=stride,
        selection_block_size=4 * stride if size > stride else stride,
    )  # fmt: skip
    parameters = [random(D, D) * D**-0.5, random(size, D)] + [random(G, size, D)] * positions

    def op(pool):
        return lambda kv, *given: pool(kv[:, :, 1], *given, *[None] * (not positions), cfg)

    parts = torch.stack([random(*shape), random(*shape)], dim=2)
    assert_no_worse(
        op(kernels.attention_pool), op(reference.attention_pool), parts, *parameters, repeat=True
    )


@pytest.mark.parametrize("size", [64, 16])  # too many tokens; few, whose W is too heavy in float32
def test_blocks_too_large_for_a_program_are_pooled_by_pytorch(size):
    cfg = NSAConfig(compress_block_size=size, compress_block_sliding_stride=size)
    inputs = random(1, 64, 1, 256), random(256, 256), random(size, 256)
    x, weight, scores = (each.float() for each in inputs)
    out = kernels.attention_pool(x, weight, scores, None, cfg)
    assert torch.equal(out, pooling.attention_pool(x, weight, scores, None, cfg))
