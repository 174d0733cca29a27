"""Means of compressed blocks against plain PyTorch."""

import pytest
from kernel_inputs import random

from nsa import kernels
from nsa.config import NSAConfig
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
