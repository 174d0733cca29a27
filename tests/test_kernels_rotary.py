"""The rotary kernel against plain PyTorch."""

import pytest
from kernel_inputs import DEVICE, random

from nsa import kernels, rotary
from nsa.testing import assert_no_worse


@pytest.mark.parametrize("shape", [(2, 1, 3, 8), (1, 17, 1, 48), (2, 20, 4, 16)])
def test_rotate(shape):
    angles = rotary.Rotary(shape[3]).angles(shape[1], DEVICE)
    assert_no_worse(
        lambda x: kernels.rotate(x, angles), lambda x: rotary.rotate(x, angles), random(*shape)
    )


def test_a_view_is_turned_where_it_lies():
    """Keys as a projection of all branches leaves them, and a gradient that is a view as well."""
    angles = rotary.Rotary(16).angles(27, DEVICE)[7:]
    parts = random(2, 20, 3, 2, 16)
    weight = random(2, 2, 20, 16)

    def op(turn):
        return lambda x: turn(x[:, :, 1], angles).transpose(1, 2) * weight.to(x.dtype)

    assert_no_worse(op(kernels.rotate), op(rotary.rotate), parts)
