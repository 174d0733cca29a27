"""Window and compressed attention, and the gated sum, against the reference."""

import pytest
import torch
from kernel_inputs import DEVICE, heads, random

from nsa import blocks, kernels, reference
from nsa.config import NSAConfig
from nsa.testing import assert_no_worse

SHAPES = {  # B, T, H, G, D, Dv
    "one token": (2, 1, 2, 1, 16, 16),
    "17 tokens, R 2, D 8": (1, 17, 4, 2, 8, 8),
    "64 tokens, R 3, D 24": (1, 64, 3, 1, 24, 16),
    "50 tokens, R 16, Dv 32": (1, 50, 16, 1, 16, 32),
    "100 tokens, R 1": (1, 100, 2, 2, 16, 16),
    "33 tokens, R 3, D 192, Dv 128": (1, 33, 3, 1, 192, 128),
    "17 tokens, D 136": (1, 17, 2, 2, 136, 16),
}


def config(**changes) -> NSAConfig:
    sizes = dict(
        sliding_window_size=23, compress_block_size=8, compress_block_sliding_stride=4,
        selection_block_size=16, num_selected_blocks=3,
    )  # fmt: skip
    return NSAConfig(**(sizes | changes))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_window(shape):
    B, T, H, G, D, Dv = shape
    cfg = config()
    assert_no_worse(
        lambda q, k, v: kernels.sliding_window_attention(q, k, v, cfg),
        lambda q, k, v: reference.sliding_window_attention(q, k, v, cfg),
        *heads(B, T, T, H, G, D, Dv),
    )


@pytest.mark.parametrize("changes", [{"sliding_window_size": 1}, {"sliding_window_size": 99}])
@pytest.mark.parametrize("causal", [True, False])
def test_window_sizes(changes, causal):
    cfg = config(causal=causal, **changes)
    assert_no_worse(
        lambda q, k, v: kernels.sliding_window_attention(q, k, v, cfg),
        lambda q, k, v: reference.sliding_window_attention(q, k, v, cfg),
        *heads(1, 70, 70, 2, 1, 16, 16),
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_compressed(shape):
    B, T, H, G, D, Dv = shape
    cfg = config()
    C = blocks.num_compress_blocks(T, cfg)
    assert_no_worse(
        lambda q, k, v: kernels.compressed_attention(q, k, v, cfg),
        lambda q, k, v: reference.compressed_attention(q, k, v, cfg),
        *heads(B, T, C, H, G, D, Dv),
    )


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("T", [5, 70])
def test_compressed_with_memory_keys(T, causal):
    cfg = config(causal=causal, compress_block_size=6)
    C = blocks.num_compress_blocks(T, cfg)
    assert_no_worse(
        lambda q, k, v, *mem: kernels.compressed_attention(q, k, v, cfg, *mem),
        lambda q, k, v, *mem: reference.compressed_attention(q, k, v, cfg, *mem),
        *heads(1, T, C, 4, 2, 16, 16),
        random(2, 3, 16),
        random(2, 3, 16),
        repeat=True,
    )


def test_large_logits():
    cfg = config()
    q, k, v = heads(1, 64, 64, 2, 1, 16, 16)
    assert_no_worse(
        lambda q, k, v: kernels.sliding_window_attention(q, k, v, cfg),
        lambda q, k, v: reference.sliding_window_attention(q, k, v, cfg),
        30 * q, k, v, roundings=100.0,
    )  # fmt: skip


def test_combine():
    gates = torch.rand(2, 17, 3, 3, dtype=torch.float64, device=DEVICE)
    branches = [random(2, 17, 3, 24) for _ in range(3)]
    assert_no_worse(kernels.combine, reference.combine, gates, *branches)


def test_mixed_dtypes_are_refused():
    q, k, v = (x.float() for x in heads(1, 5, 5, 1, 1, 16, 16))
    with pytest.raises(ValueError, match="of one dtype"):
        kernels.sliding_window_attention(q, k.half(), v, config())


def test_heads_wider_than_256_are_refused():
    q, k, v = (x.float() for x in heads(1, 5, 5, 1, 1, 260, 16))
    with pytest.raises(ValueError, match="260 is above 256"):
        kernels.sliding_window_attention(q, k, v, config())
