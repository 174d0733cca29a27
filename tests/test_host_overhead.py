"""A layer asks no more of the host than it did, and the whole op no more memory."""

import pytest

pytest.importorskip("triton")

from benchmarks.probes import host_overhead, memory
from benchmarks.probes.host_overhead import NARROW, Counts
from benchmarks.workloads import LAYOUTS


def test_ops_and_launches_do_not_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer are welcome: then lower the numbers here. torch_kernels are those of a CPU."""
    monkeypatch.undo()  # memory that tests poison is an op more for every allocation
    forward, backward = map(host_overhead.counts, host_overhead.counted(NARROW, autocast=False))
    most = Counts(launches=11, custom_ops=12, torch_kernels=15, torch_calls=172)
    assert all(n <= limit for n, limit in zip(forward, most, strict=True)), forward
    most = Counts(launches=16, custom_ops=6, torch_kernels=43, torch_calls=253)
    assert all(n <= limit for n, limit in zip(backward, most, strict=True)), backward


@pytest.mark.parametrize(("heads", "most"), [("8/4", 0.78), ("16/16", 4.02)])
def test_the_peak_at_64k_does_not_grow(heads, most, monkeypatch: pytest.MonkeyPatch) -> None:
    """In GiB, as predicted from a sixteenth of the tokens: the selected branch's backward pass."""
    monkeypatch.undo()
    peak, holders = memory.peak(memory.allocations(LAYOUTS[heads], 65536 // memory.SCALE))
    assert peak * memory.SCALE / 2**30 < most, holders
