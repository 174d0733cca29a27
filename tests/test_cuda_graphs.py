"""compile=reduce-overhead: where is it refused, and does it train as compile=true does?

A CPU shows what the module does for the sake of graphs, a GPU that it is enough.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from test_train import (
    ADAMW,
    MODEL,
    ROOT,
    Counting,
    fitted,
    make_module,
    make_trainer,
    run_python,
    weights,
)
from tiny_run import OF_LIGHTNING
from torch import Tensor, nn

from benchmarks import train_step
from nsa.training import cuda_graphs, parallel

pytestmark = OF_LIGHTNING
MODE = "reduce-overhead"
EVERY_STEP = {"check_val_every_n_epoch": None, "val_check_interval": 2}  # of two micro-batches


class Steps(L.Callback):
    """Losses and gradient norms, and whether each backward pass added to the gradients it found."""

    def __init__(self) -> None:
        self.figures: list[float] = []
        self.found: list[Tensor | None] = []
        self.added: list[bool] = []

    def on_before_backward(self, trainer: L.Trainer, pl_module: Any, loss: Tensor) -> None:
        self.found = [parameter.grad for parameter in pl_module.parameters()]

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        now = [parameter.grad for parameter in pl_module.parameters()]
        self.added.append(all(a is b for a, b in zip(now, self.found, strict=True)))
        if pl_module.global_step > len(self.figures) // 3:  # a step is done
            self.figures += [*pl_module.step_losses.tolist(), float(pl_module.grad_norm)]


def trained(folder: Path, module: Any, data: Counting | None = None, **options: Any) -> Steps:
    """Steps of two micro-batches with a validation behind each, and one before them."""
    steps = Steps()
    options = {"accumulate_grad_batches": 2, "num_sanity_val_steps": 1, **EVERY_STEP} | options
    fitted(folder, data or Counting(2), module, callbacks=[steps], **options)
    return steps


# What is refused


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="compile=fast must be one of auto, false, true, reduce-o"):
        make_module(compile="fast")


def test_devices_without_graphs_are_refused(tmp_path: Path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="needs a GPU, not device cpu: set compile=true"):
        make_module(compile=MODE).check_trainer(make_trainer(tmp_path))
    several = make_trainer(tmp_path, strategy=DDPStrategy(), devices=2)
    monkeypatch.setattr(DDPStrategy, "root_device", torch.device("cuda", 0))
    with pytest.raises(ValueError, match=r"trains on one GPU.* trainer=gpu trainer\.devices=1"):
        make_module(compile=MODE).check_trainer(several)
    make_module(compile=True).check_trainer(several)


def test_auto_is_what_was_tried_on_the_device() -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert parallel.resolve_compile("auto", gpu, tried=True) == MODE
    assert parallel.resolve_compile("auto", gpu, tried=False) is True
    assert parallel.resolve_compile("auto", cpu, tried=True) is False
    assert parallel.resolve_compile(True, cpu, tried=True) is True


def test_auto_records_no_graphs_of_what_is_recomputed_or_distributed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(SingleDeviceStrategy, "root_device", torch.device("cuda", 0))
    for mode, compiles in (("none", MODE), ("full", True)):
        module = make_module(compile="auto", activation_checkpointing=mode)
        module.trainer = make_trainer(tmp_path)
        assert module.compile_mode == compiles
    monkeypatch.setattr(DDPStrategy, "root_device", torch.device("cuda", 0))
    module.trainer = make_trainer(tmp_path, strategy=DDPStrategy(), devices=2)
    assert module.compile_mode is True


# What is done for the sake of graphs


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Modules that do on a CPU what graphs ask for, without any; `events` says what they did."""
    monkeypatch.setattr(cuda_graphs, "check_device", lambda device, *, distributed: None)
    monkeypatch.setattr(nn.Module, "compile", lambda block, *, mode: None)
    events: list[Any] = []
    monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", lambda: events.append("mark"))

    def make(**changes: Any) -> Any:
        torch.manual_seed(0)
        module = make_module(**changes)
        module.events = events
        module.model.register_forward_pre_hook(
            lambda *_: events.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))
        )
        return module

    return make


@pytest.mark.parametrize(
    ("compile", "modes"), [(False, []), (True, [None, None]), (MODE, [MODE, MODE])]
)
def test_every_block_is_compiled_in_the_mode_asked_for(compile, modes, monkeypatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda block, *, mode: asked.append(mode))
    parallel.compile_blocks(make_module().model, compile)
    assert asked == modes


def test_every_forward_pass_begins_with_a_mark_outside_inference_mode(tmp_path, on_cpu) -> None:
    learning, evaluating, inferring = (True, False), (False, False), (False, True)
    expected = {MODE: evaluating, True: inferring}
    for compile, testing in expected.items():
        module = on_cpu(compile=compile)
        trained(tmp_path, module, max_steps=2)
        module.trainer.validate(module, datamodule=Counting(), verbose=False)
        passes = [event for event in module.events if event != "mark"]
        step = [learning] * 2 + [evaluating] * 2
        assert passes == [evaluating, *step, *step, testing, testing]
        marks = [event for event in module.events[::2] if event == "mark"]
        assert len(marks) == (len(passes) if compile == MODE else 0)
        module.events.clear()


def test_gradients_have_buffers_of_their_own_and_weights_are_the_same(tmp_path, on_cpu) -> None:
    """Validations, before which Lightning drops all gradients, included."""
    plain, replaying = on_cpu(compile=False), on_cpu(compile=MODE)
    before = trained(tmp_path, plain, gradient_clip_val=1.0)
    after = trained(tmp_path, replaying, gradient_clip_val=1.0)
    assert before.added == [False, True] * 3 and after.added == [True, True] * 3
    assert len(after.figures) == 9 and after.figures == before.figures
    assert torch.equal(weights(plain), weights(replaying))


def test_a_gradient_that_was_dropped_gets_a_buffer_again() -> None:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(layer.parameters())
    layer(torch.ones(2)).sum().backward()
    layer.bias.grad = None  # as a step does that is skipped, without a fused optimizer
    cuda_graphs.zero_gradients(optimizer)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in layer.parameters())


def test_the_benchmark_takes_steps_with_graphs_where_there_is_a_gpu(on_cpu) -> None:
    sizes = "--sizes tiny --kinds nsa --tokens 32 --compiled-tokens 32 --tokens-per-step 64"
    arguments = [*sizes.split(), "--backends", "reference", "--device"]
    jobs = {
        d: train_step.jobs_of("tiny", train_step.parse([*arguments, d])) for d in ("cpu", "cuda")
    }
    assert [name for name, _ in jobs["cpu"]] == ["nsa reference", "nsa reference compiled"]
    assert jobs["cuda"] == [*jobs["cpu"], ("nsa reference graphs", 32)]
    options = train_step.parse([*arguments, "cpu"])
    step = train_step.build("tiny", jobs["cuda"][-1], options, depth=1)
    assert step() > step()
    assert on_cpu().events == ["mark", "mark"]
    assert train_step.columns("tiny", jobs["cuda"][-1], options)["backend"] == "reference graphs"


# What a GPU shows

WIDE = {
    "dim": 64,
    "dim_head": 32,
    "seq_len": 64,
    "layer_pattern": ["nsa"],
    "attention": {
        "sliding_window_size": 32,
        "compress_block_size": 16,
        "compress_block_sliding_stride": 8,
        "selection_block_size": 16,
        "num_selected_blocks": 2,
        "compress_network": "grouped_mlp",
        "compress_mlp_expand_factor": 0.25,
        "backend": "triton",
    },
}


class Wide(Counting):
    """Sequences that are long enough for every branch."""

    @staticmethod
    def sequences(first: int, count: int) -> Tensor:
        return (torch.arange(first, first + count)[:, None] + torch.arange(65)) % MODEL[
            "vocab_size"
        ]


def learned_on_a_gpu(folder: Path, compile: bool | str, dropout: float) -> list[float]:
    """Losses and gradient norms of six steps, and the loss of the last validation."""
    torch.compiler.reset()
    torch.manual_seed(0)
    options: Any = {"accelerator": "gpu", "devices": 1, "precision": "bf16-mixed", "max_steps": 6}
    model, optimizer = MODEL | WIDE | {"dropout": dropout}, ADAMW | {"lr": 3e-3}
    module = make_module(model=model, optimizer=optimizer, compile=compile)
    steps = trained(folder, module, Wide(2), gradient_clip_val=1.0, **options)
    return [*steps.figures, float(module.trainer.callback_metrics["val/loss"])]


def recorded_graphs() -> int:
    from torch._inductor.cudagraph_trees import get_manager

    manager = get_manager(0, create_if_none_exists=False)
    return 0 if manager is None else manager.new_graph_id().id


ON_A_GPU = """
import sys
from pathlib import Path
import pytest
from test_cuda_graphs import MODE, learned_on_a_gpu, recorded_graphs
for dropout in (0.0, 0.1):
    want = learned_on_a_gpu(Path(sys.argv[1]), True, dropout)
    assert recorded_graphs() == 0
    got = learned_on_a_gpu(Path(sys.argv[1]), MODE, dropout)
    assert recorded_graphs() > 0
    assert want[-1] < want[0] - 0.1, want
    assert got == pytest.approx(want, rel=0.05), (dropout, got, want)
"""


@pytest.mark.gpu
def test_graphs_learn_what_compiled_blocks_learn(tmp_path: Path) -> None:
    """In a process of its own: the shape checks of the test run are not for a compiler."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    code = f"import sys; sys.path[:0] = {paths.split(os.pathsep)!r}\n{ON_A_GPU}"
    done = run_python("-c", code, str(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
