"""Kernels at real sizes in bfloat16, float16 and float32, on a GPU."""

import os
import time

import pytest
import torch

pytest.importorskip("triton")

from benchmarks.check_kernels import CHECKS, run_alone


def test_unmarked_tests_see_no_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ["TRITON_INTERPRET"] == "1"
    assert not torch.cuda.is_available()


@pytest.mark.gpu
@pytest.mark.parametrize("name", [*CHECKS, "addresses"])
def test_case(name):
    """Each case in a process of its own, so that a broken GPU context costs only itself."""
    report = run_alone("check", name, time.time() + 280)
    assert "ok" in report and "FAIL" not in report, report
