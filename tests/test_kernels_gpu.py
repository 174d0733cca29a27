"""Kernels at real sizes in bfloat16, float16 and float32, on a GPU."""

import os

import pytest
import torch

pytest.importorskip("triton")

import conftest
import kernel_cases


def test_unmarked_tests_see_no_gpu():
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "" and os.environ["TRITON_INTERPRET"] == "1"
    assert not torch.cuda.is_available()


def test_unmarked_tests_interpret_kernels_on_any_machine(monkeypatch, pytestconfig):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("TRITON_INTERPRET")
    conftest.pytest_configure(pytestconfig)
    assert os.environ["TRITON_INTERPRET"] == "1"


def test_a_check_that_raises_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(kernel_cases, "FAILED", failed := [])
    kernel_cases.attempt("holds", lambda: "ok")
    kernel_cases.attempt("breaks", lambda: [][0])
    kernel_cases.attempt("is wrong", lambda: "FAIL out 2.00")
    assert failed == ["breaks", "is wrong"] and "FAIL IndexError" in capsys.readouterr().out


@pytest.mark.gpu
@pytest.mark.parametrize("name", kernel_cases.NAMES)
def test_case(name):
    """Each case in a process of its own, so that a broken GPU context costs only itself."""
    report = kernel_cases.run_alone(name, seconds=280)
    assert "ok" in report and "FAIL" not in report, report
