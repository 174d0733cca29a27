"""Kernels are judged by an interpreter of ours: do its operators do what Triton's own do?"""

from itertools import product

import numpy as np
import pytest
import triton.language as tl
import vectorised_interpreter as quick
from triton.runtime.interpreter import TensorHandle

DTYPES = (tl.float32, tl.float16, tl.float64, tl.int1, tl.int32, tl.int64, tl.uint32)
SHAPES = ((), (4,), (2, 4), (1, 4), (2, 1))
KINDS = [(dtype, SHAPES[i % len(SHAPES)]) for i, dtype in enumerate(DTYPES)]
FLOATS = [(tl.float32, shape) for shape in SHAPES]
NUMBERS = (0, 3, -2, 2**40, True, -1.5, tl.constexpr(2))
OPERANDS = [*product(KINDS, KINDS), *product(FLOATS, FLOATS), *product(KINDS, NUMBERS)]


def tensor(dtype: tl.dtype, shape: tuple[int, ...], first: int) -> tl.tensor:
    data = (np.arange(first, first + 8)[: max(1, int(np.prod(shape)))] % 5 + 1).reshape(shape or 1)
    handle = TensorHandle(data.astype(quick.np_dtype(dtype)), dtype)
    return tl.tensor(handle, tl.block_type(dtype, list(shape)) if shape else dtype)


def result(operator, left, right) -> tuple:
    """What the operator makes, or why it does not."""
    try:
        with np.errstate(all="ignore"):
            out = operator(left, right)
    except Exception as error:
        return type(error), str(error)
    data = out.handle.data
    return out.type.name, out.dtype, out.shape, data.dtype, data.shape, data.tobytes()


@pytest.mark.parametrize(("place", "name"), [*enumerate(quick.OPERATORS)])
def test_an_operator_does_the_same_when_it_remembers_how(place: int, name: str) -> None:
    """Every operator on a fifth of the operands: they share what they do before the arithmetic."""

    def kernel() -> None:
        """Has `tl`."""

    scope = quick.patch(kernel)
    try:
        slow, ways = getattr(tl.tensor, name), {}
        remembering = quick.remembering_types(slow, ways)
        for kind, given in OPERANDS[place % 5 :: 5]:
            for first in (0, 3):  # the second time by what the first one taught
                left = tensor(*kind, first)
                right = tensor(*given, first + 1) if isinstance(given, tuple) else given
                assert result(remembering, left, right) == result(slow, left, right), (kind, given)
        assert sum(way is not None for way in ways.values()) > 3
    finally:
        scope.restore()
