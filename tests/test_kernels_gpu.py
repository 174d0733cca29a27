"""Kernels at real sizes in bfloat16, float16 and float32, on a GPU."""

import time

import pytest

pytest.importorskip("triton")

from benchmarks.check_kernels import CHECKS, run_alone


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CHECKS, "addresses"])
def test_case(name):
    """Each case in a process of its own, so that a broken GPU context costs only itself."""
    report = run_alone("check", name, time.time() + 280)
    assert "ok" in report and "FAIL" not in report, report
