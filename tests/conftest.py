"""What every test shares: a fixed seed, and memory that looks wrong until somebody writes it."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest
import torch


def pytest_configure(config: pytest.Config) -> None:
    """Tests without the gpu marker run as on a machine without a GPU, whatever is there."""
    if config.option.markexpr == "not gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"
    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
    if os.environ.get("TRITON_INTERPRET") == "1":
        import vectorised_interpreter  # late: it imports triton

        vectorised_interpreter.install()


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgot to write reads as NaN, not as luck."""
    from nsa.testing import ALLOCATORS, poisoned  # late: types are checked of what follows the hook

    for name in ALLOCATORS:
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
