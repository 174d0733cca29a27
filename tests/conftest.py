"""What every test shares: a fixed seed, and memory that looks wrong until somebody writes it."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "offline")

import pytest

SLOWEST = (  # begun first, so that none is left to one worker in the end
    *("test_kernels_compile", "test_resume_matrix", "test_train", "test_parallel"),
    *("test_command_line", "test_configs", "test_sweep", "test_resume", "test_checkpoints"),
)


def pytest_configure(config: pytest.Config) -> None:
    """Tests without the gpu marker run as on a machine without a GPU, whatever is there."""
    gc.disable()  # until tests are collected: next to nothing that is imported is garbage
    if config.option.markexpr == "not gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ["TRITON_INTERPRET"] = "1"
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        return  # tests run in the workers
    # Here, since what is first imported while the checks of types watch an import is compiled anew.
    import beartype.door  # noqa: F401
    import torch._dynamo

    if not torch.cuda.is_available():
        os.environ.setdefault("TRITON_INTERPRET", "1")  # read when triton is first imported
    if os.environ.get("TRITON_INTERPRET") == "1":
        import vectorised_interpreter  # late: it imports triton

        vectorised_interpreter.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(SLOWEST)))


def pytest_collection_finish() -> None:
    gc.freeze()  # and need not be looked through again
    gc.enable()


@pytest.fixture(autouse=True)
def seed() -> None:
    import torch

    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def poison_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that a kernel forgot to write reads as NaN, not as luck."""
    import torch

    from nsa.testing import ALLOCATORS, poisoned  # late: types are checked of what follows the hook

    for name in ALLOCATORS:
        monkeypatch.setattr(torch, name, poisoned(getattr(torch, name)))
