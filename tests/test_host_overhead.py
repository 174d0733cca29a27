"""A layer asks no more of the host than it did."""

import pytest

pytest.importorskip("triton")

from benchmarks import host_overhead
from benchmarks.host_overhead import NARROW, Counts


def test_ops_and_launches_do_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer are welcome: then lower the numbers here. torch_kernels are those of a CPU."""
    monkeypatch.undo()  # memory that tests poison is an op more for every allocation
    forward, backward = map(host_overhead.counts, host_overhead.counted(NARROW, autocast=False))
    most = Counts(launches=9, custom_ops=9, torch_kernels=29, torch_calls=220)
    assert all(n <= limit for n, limit in zip(forward, most, strict=True)), forward
    most = Counts(launches=10, custom_ops=7, torch_kernels=52, torch_calls=324)
    assert all(n <= limit for n, limit in zip(backward, most, strict=True)), backward
