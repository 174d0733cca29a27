"""dK and dV summed from their parts."""

import pytest
import torch
from kernel_inputs import DEVICE

from nsa.kernels.partial_sums import summed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("parts", "index_heads"), [(1, 2), (3, 2), (2, 6)])
def test_parts_are_summed_in_float32(parts, index_heads, dtype):
    """Over runs of tokens and the index heads of a key head, for widths of their own."""
    k, v = (torch.empty(2, 37, 2, D, dtype=dtype, device=DEVICE) for D in (24, 16))
    part_dk, part_dv = (torch.randn(parts, 2, 37, index_heads, D, device=DEVICE) for D in (24, 16))
    dk, dv = summed(part_dk, part_dv, k, v, index_heads)
    for got, part, like in ((dk, part_dk, k), (dv, part_dv, v)):
        expected = part.view(parts, 2, 37, 2, index_heads // 2, -1).sum((0, 4))
        assert got.dtype == dtype and got.shape == like.shape
        torch.testing.assert_close(got, expected.to(dtype))


def test_one_chunk_of_many_is_cast():
    """What several chunks added up in float32 [B, S, J, D] is still to become the inputs' dtype."""
    k = torch.empty(1, 5, 2, 16, dtype=torch.float16, device=DEVICE)
    total = torch.randn(1, 5, 2, 16, device=DEVICE)
    dk, dv = summed(total, total * 2, k, k, 2)
    assert torch.equal(dk, total.half()) and torch.equal(dv, (total * 2).half())


def test_sums_are_returned_as_they_are():
    k = torch.randn(1, 5, 2, 16, device=DEVICE)
    dk, dv = summed(k, k, k, k, 2)
    assert dk.data_ptr() == dv.data_ptr() == k.data_ptr()


def test_no_keys():
    """A sequence that is shorter than a compressed block has none."""
    k = torch.empty(1, 0, 2, 16, device=DEVICE)
    dk, _ = summed(torch.empty(1, 1, 0, 4, 16, device=DEVICE), k, k, k, 4)
    assert dk.shape == k.shape
