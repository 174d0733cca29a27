"""compile=reduce-overhead: where is it refused, and does it train as compile=true does?

A CPU shows what the module does for the sake of graphs, a GPU that it is enough.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from test_train import (
    ADAMW,
    MODEL,
    ROOT,
    Counting,
    fitted,
    make_module,
    make_trainer,
)
from tiny_run import OF_LIGHTNING, weights
from torch import Tensor, nn

from benchmarks import train_step
from nsa.training import cuda_graphs, parallel
from nsa.training.replicas import ReplicaStrategy
from runs.strategies import FSDP2Strategy

pytestmark = OF_LIGHTNING
MODE = "reduce-overhead"
EVERY_STEP = {"check_val_every_n_epoch": None, "val_check_interval": 2}  # of two micro-batches


class Steps(L.Callback):
    """Losses and gradient norms of every step, and the gradients' places."""

    def __init__(self) -> None:
        self.figures: list[float] = []
        self.places: list[list[int]] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        self.places.append([p.grad.data_ptr() for p in pl_module.parameters()])

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if pl_module.global_step > len(self.figures) // 3:  # a step is done
            self.figures += [*pl_module.step_losses.tolist(), float(pl_module.grad_norm)]


def trained(folder: Path, module: Any, data: Counting | None = None, **options: Any) -> Steps:
    """Steps of two micro-batches with a validation behind each, and one before them."""
    steps = Steps()
    options = {"accumulate_grad_batches": 2, "num_sanity_val_steps": 1, **EVERY_STEP} | options
    fitted(folder, data or Counting(2), module, callbacks=[steps], **options)
    return steps


# What is refused, and what is said


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="compile=fast must be one of auto, false, true, reduce-o"):
        make_module(compile="fast")


def test_devices_without_graphs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="needs a GPU, not device cpu: set compile=true"):
        make_module(compile=MODE).check_trainer(make_trainer(tmp_path))


def test_auto_replays_graphs_where_there_are_any() -> None:
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert parallel.resolve_compile("auto", gpu) == MODE
    assert parallel.resolve_compile("auto", cpu) is False
    assert parallel.resolve_compile(True, cpu) is True
    assert parallel.resolve_compile(False, gpu) is False


@pytest.mark.parametrize(
    ("options", "asked", "why"),
    [
        ({}, {}, None),
        ({}, {"recomputes": True}, None),
        ({}, {"draws": True}, None),
        ({}, {"recomputes": True, "draws": True}, "activation_checkpointing with dropout"),
        ({"strategy": ReplicaStrategy(), "devices": 2}, {}, None),
        ({"strategy": DDPStrategy(), "devices": 2}, {}, "hooks of DDPStrategy"),
        ({"strategy": FSDP2Strategy(), "devices": 2}, {}, "hooks of FSDP2Strategy"),
    ],
)
def test_what_keeps_steps_from_being_replayed(tmp_path, options, asked, why) -> None:
    trainer = make_trainer(tmp_path, **options)
    found = cuda_graphs.obstacle(trainer, **{"recomputes": False, "draws": False} | asked)
    assert (found is None) if why is None else (found is not None and why in found)


def test_a_scaled_loss_is_not_replayed(tmp_path: Path, monkeypatch) -> None:
    trainer = make_trainer(tmp_path)
    monkeypatch.setattr(trainer.precision_plugin, "scaler", object(), raising=False)
    found = cuda_graphs.obstacle(trainer, recomputes=False, draws=False)
    assert found is not None and "scales the loss" in found


# What is done for the sake of graphs


class Recorded:
    """In place of a graph: warms up as one does, then does what was recorded, for its shape."""

    made: ClassVar[list["Recorded"]] = []

    def __init__(self, learn: cuda_graphs.Learn, batch: dict[str, Tensor]) -> None:
        self.learn, self.replays = learn, 0
        torch.manual_seed(123)
        learn(batch)
        Recorded.made.append(self)

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        self.replays += 1
        return self.learn(batch)


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Modules that do on a CPU what graphs ask for, without any."""
    monkeypatch.setattr(cuda_graphs, "check_device", lambda device: None)
    monkeypatch.setattr(nn.Module, "compile", lambda block: None)
    monkeypatch.setattr(cuda_graphs, "MicroBatchGraph", Recorded)
    monkeypatch.setattr(Recorded, "made", [])

    def make(**changes: Any) -> Any:
        torch.manual_seed(0)
        return make_module(**changes)

    return make


@pytest.mark.parametrize(("compile", "blocks"), [(False, 0), (True, 2), (MODE, 2)])
def test_every_block_is_compiled_if_asked_for(compile, blocks, monkeypatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(nn.Module, "compile", lambda block: asked.append(block))
    parallel.compile_blocks(make_module().model, compile)
    assert len(asked) == blocks


FREE = {"num_initial_blocks": 0, "num_local_blocks": 1}  # two of three blocks to choose from
STAGES = [{"until": 0.4, "num_selected_blocks": 3}, {"until": 0.7, "num_selected_blocks": 1}]


@pytest.mark.parametrize(
    ("changes", "replays"),
    [
        ({}, [6]),
        ({"model": MODEL | {"dropout": 0.2}}, [6]),
        (
            {
                "model": MODEL | {"attention": MODEL["attention"] | FREE},
                "importance_loss": {"weight": 0.5, "num_queries": 3},
                "sparsity_schedule": STAGES,
            },
            [4, 2],  # each stage records a graph of its own
        ),
    ],
)
def test_replayed_steps_learn_what_others_learn(tmp_path: Path, on_cpu, changes, replays) -> None:
    """Clipped, accumulated, with validations, before which Lightning drops all gradients."""
    plain, replaying = on_cpu(compile=False, **changes), on_cpu(compile=MODE, **changes)
    before = trained(tmp_path, plain, gradient_clip_val=1.0)
    after = trained(tmp_path, replaying, gradient_clip_val=1.0)
    assert replaying.replays_graphs and not plain.replays_graphs
    assert [graph.replays for graph in Recorded.made] == replays
    assert after.figures == pytest.approx(before.figures, rel=1e-6)
    torch.testing.assert_close(weights(plain), weights(replaying), rtol=1e-5, atol=1e-6)


def test_gradients_stay_where_the_graph_writes_them(tmp_path: Path, on_cpu) -> None:
    steps = trained(tmp_path, on_cpu(compile=MODE))
    assert len(steps.places) == 3 and steps.places[0] == steps.places[1] == steps.places[2]


def test_a_broken_loss_breaks_the_gradient_and_changes_no_weight(tmp_path: Path, on_cpu) -> None:
    module = on_cpu(compile=MODE)
    learned = module.losses.learn
    module.losses.learn = lambda batch, **counted: tuple(
        x * float("inf") for x in learned(batch, **counted)
    )
    before = weights(module)
    steps = trained(tmp_path, module)
    assert not any(map(torch.isfinite, torch.tensor(steps.figures)))
    assert torch.equal(weights(module), before)


def test_what_cannot_be_recorded_is_said_once_and_trained_without(
    tmp_path: Path, on_cpu, monkeypatch
) -> None:
    def fail(learn: Any, batch: Any) -> None:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(cuda_graphs, "MicroBatchGraph", fail)
    plain, failing = on_cpu(compile=False), on_cpu(compile=MODE)
    before = trained(tmp_path, plain)
    with pytest.warns(UserWarning, match="not replayed as CUDA graphs: recording .*permitted") as w:
        after = trained(tmp_path, failing)
    assert sum("not replayed" in str(warning.message) for warning in w) == 1
    assert after.figures == pytest.approx(before.figures, rel=1e-6)


def test_an_obstacle_is_said_once_and_the_run_goes_on(tmp_path: Path, on_cpu) -> None:
    options = {"compile": MODE, "activation_checkpointing": "full"}
    module = on_cpu(**options, model=MODEL | {"dropout": 0.2})
    with pytest.warns(UserWarning, match="not replayed as CUDA graphs: activation_check") as w:
        trained(tmp_path, module)
    assert sum("not replayed" in str(warning.message) for warning in w) == 1
    assert not module.replays_graphs and not Recorded.made
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="steps are not replayed")
        module.trainer.validate(module, datamodule=Counting(), verbose=False)


def test_memory_that_is_out_ends_the_run(tmp_path: Path, on_cpu, monkeypatch) -> None:
    def full(learn: Any, batch: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(cuda_graphs, "MicroBatchGraph", full)
    with pytest.raises(torch.OutOfMemoryError):
        trained(tmp_path, on_cpu(compile=MODE))


def test_gradients_are_parts_of_one_array_a_dtype() -> None:
    half = torch.ones(2, dtype=torch.bfloat16)
    parameters = [nn.Parameter(x) for x in (torch.ones(3, 5), torch.ones(7), half)]
    buffer = cuda_graphs.GradientBuffer(parameters)
    buffer.zero()
    torch.stack([(2 * p.float()).sum() for p in parameters]).sum().backward()
    assert [len(array) for array in buffer.arrays] == [128, 64]
    assert [float(array.sum()) for array in buffer.arrays] == [2 * 22, 4]
    parameters[0].grad = None  # as Lightning does before a validation
    buffer.zero()
    assert all(p.grad is not None and not p.grad.any() for p in parameters)


def test_the_benchmark_takes_steps_with_graphs_where_there_is_a_gpu(on_cpu, monkeypatch) -> None:
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
    assert [graph.replays for graph in Recorded.made] == [2]
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


def count_replays() -> list[int]:
    """Which grows by every replay of a graph."""
    replays: list[int] = []
    replay = torch.cuda.CUDAGraph.replay

    def counted(graph: Any) -> None:
        replays.append(1)
        replay(graph)

    torch.cuda.CUDAGraph.replay = counted  # type: ignore[method-assign]
    return replays


ON_A_GPU = """
import sys
from pathlib import Path
import pytest
from test_cuda_graphs import MODE, count_replays, learned_on_a_gpu
for dropout in (0.0, 0.1):
    replays = count_replays()
    want = learned_on_a_gpu(Path(sys.argv[1]), True, dropout)
    assert not replays
    got = learned_on_a_gpu(Path(sys.argv[1]), MODE, dropout)
    assert len(replays) == 12  # six steps of two micro-batches
    again = learned_on_a_gpu(Path(sys.argv[1]), MODE, dropout)
    assert again == got
    assert want[-1] < want[0] - 0.1, want
    assert got == pytest.approx(want, rel=0.05), (dropout, got, want)
"""


@pytest.mark.gpu
def test_graphs_learn_what_compiled_blocks_learn(tmp_path: Path) -> None:
    """In a process of its own: the shape checks of the test run are not for a compiler."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    code = f"import sys; sys.path[:0] = {paths.split(os.pathsep)!r}\n{ON_A_GPU}"
    command = [sys.executable, "-W", "ignore", "-c", code, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
