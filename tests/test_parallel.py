"""Recomputed, compiled and sharded: does a Transformer still learn what it learns on one device?"""

import signal
import subprocess
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import forked_runs
import pytest
import torch
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from parallel_runs import ROOT, results
from squares import squares
from test_train import ATTENTION, MODEL, TINY, Counting, make_module
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.utils._python_dispatch import TorchDispatchMode

from nsa.training import parallel
from nsa.training.label_sums import label_sums
from nsa.transformer import Transformer
from runs import strategies

MODES = ("none", "full", "selective")
RUNS = (
    *(
        "one",
        "ddp",
        "replicas",
        "fsdp",
        "fsdp_kept_lean",
        "ddp_bf16",
        "fsdp_bf16",
        "dense",
        "dense_compiled",
    ),
    *("triton", "triton_fsdp_compiled", "broken_shard"),
)


class Executed(TorchDispatchMode):
    """Counts the operations that run."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        return func(*args, **kwargs or {})


class Trace:
    """A forward and a backward pass of a small model with dropout."""

    def __init__(self, mode: str, backend: str, autocast: bool = False) -> None:
        torch.manual_seed(0)
        attention = ATTENTION | {"backend": backend}
        changes = {"dropout": 0.3, "tie_embeddings": True, "attention": attention}
        model = Transformer(**{key: MODEL[key] for key in MODEL if key != "name"} | changes)
        names = list(model.state_dict())
        parallel.checkpoint_activations(model, mode)
        assert list(model.state_dict()) == names
        self.bytes = 0  # that the forward pass keeps for the backward one
        torch.manual_seed(1)
        with (
            Executed() as forward,
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
            torch.autograd.graph.saved_tensors_hooks(self.keep, lambda tensor: tensor),
        ):
            nats = label_sums(model, Counting.sequences(0, 1)).nats
        with Executed() as backward:
            nats.backward()
        self.forward, self.backward = forward.counts, backward.counts
        self.grads = {name: parameter.grad for name, parameter in model.named_parameters()}

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, nn.Parameter):
            self.bytes += tensor.nbytes
        return tensor


# Activation checkpointing


@pytest.mark.parametrize(
    ("backend", "autocast"), [("reference", False), ("reference", True), ("triton", False)]
)
def test_what_is_recomputed_changes_no_gradient(backend: str, autocast: bool) -> None:
    none, full, selective = (Trace(mode, backend, autocast) for mode in MODES)
    for name, grad in none.grads.items():
        assert torch.equal(grad, full.grads[name]), name
        assert torch.equal(grad, selective.grads[name]), name
    assert full.bytes < none.bytes / 4

    by_triton = backend == "triton"
    attention = "nsa.attend_tiles" if by_triton else "aten.bmm"
    for product in ["aten.mm.default", f"{attention}.default"]:
        assert full.backward[product] > none.backward[product], product
        assert selective.backward[product] == none.backward[product], product
    for cheap in ("aten.silu.default", "aten.sigmoid.default"):
        assert full.backward[cheap] > 0 and selective.backward[cheap] > 0, cheap
        assert none.backward[cheap] == 0, cheap
    choice = "nsa.select_blocks.default" if by_triton else "aten.sort.stable"
    assert full.forward[choice] and not full.backward[choice]  # selected once
    assert selective.forward[choice] and not selective.backward[choice]


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(ValueError, match="'some' must be one of none, full, selective"):
        make_module(activation_checkpointing="some")


@pytest.mark.parametrize(
    ("reshard", "gathered_bytes", "want"),
    [("auto", 8, False), ("auto", 11, True), (True, 8, True), (False, 11, False)],
)
def test_gathered_weights_stay_where_they_are_small(
    reshard: bool | str, gathered_bytes: int, want: bool
) -> None:
    assert parallel.resolve_reshard(reshard, gathered_bytes, memory=100) is want


def test_whether_to_reshard_reaches_every_block(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr(
        parallel, "fully_shard", lambda *_, **how: asked.append(how.get("reshard_after_forward"))
    )
    model, mesh = make_module().model, Mock(spec=DeviceMesh, device_type="cpu")
    for reshard in ("auto", False):
        parallel.shard(model, mesh, reshard=reshard)
    blocks = len(model.blocks)
    assert asked == [None, *[True] * blocks, None, *[False] * blocks]
    with pytest.raises(ValueError, match="reshard_after_forward=never must be one of auto, false"):
        strategies.FSDP2Strategy(reshard_after_forward="never")


# Many processes


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return results(tmp_path_factory.mktemp("parallel"), RUNS)


def assert_same(got: dict[str, Any], want: dict[str, Any]) -> None:
    """The loss and the norm of the gradient of every step."""
    assert got["steps"].keys() == want["steps"].keys()
    for step, numbers in want["steps"].items():
        assert got["steps"][step] == pytest.approx(numbers, abs=1e-6, rel=1e-6), step


@pytest.mark.parametrize("kind", ["ddp", "replicas", "fsdp", "fsdp_kept_lean"])
def test_two_processes_learn_what_one_learns(runs: dict[str, Any], kind: str) -> None:
    assert_same(runs[kind], runs["one"])


@pytest.mark.parametrize("kind", ["ddp", "replicas", "fsdp"])
def test_two_processes_evaluate_what_one_evaluates(runs: dict[str, Any], kind: str) -> None:
    """After training: Lightning configures the model a second time."""
    assert runs[kind]["val/loss"] == pytest.approx(runs["one"]["val/loss"], rel=1e-6)
    assert runs[kind]["flops"] == runs["one"]["flops"] > 0


def test_sharding_rounds_no_more_than_autocast_does(runs: dict[str, Any]) -> None:
    assert_same(runs["fsdp_bf16"], runs["ddp_bf16"])


def test_a_compiler_sees_through_recomputation(runs: dict[str, Any]) -> None:
    assert_same(runs["dense_compiled"], runs["dense"])


THREE_KINDS = """
import einops
import torch
from test_train import MODEL
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from nsa.training import parallel
from nsa.transformer import Transformer

programs = []
compiled = nn.Module.compile
def count(graph, inputs):
    programs.append(graph)
    return graph.forward

nn.Module.compile = lambda block: compiled(block, backend=count)
kinds = {"layer_pattern": ["nsa", "window", "dense"], "depth": 3}
model = Transformer(**{key: MODEL[key] for key in MODEL if key != "name"} | kinds)
parallel.compile_blocks(model, True)
tokens = torch.randint(MODEL["vocab_size"], (4, model.seq_len))
model(tokens)[..., 0].sum().backward()
with torch.no_grad():
    model(tokens)
    model(tokens[:3])
print("programs:", len(programs))
called = {node.target for graph in programs for node in graph.graph.nodes}
print("whole:", {einops.rearrange, einops.einsum} <= called)
"""


def test_layers_of_three_kinds_stay_compiled() -> None:
    """In training, in validation, and with a smaller last batch: nine programs.

    None has looked into einops, whose reading of patterns would take most of the time.
    """
    done = forked_runs.python(THREE_KINDS)  # the run-time type checks of tests defy Dynamo
    assert "programs: 9\nwhole: True" in done.stdout, done.stdout + done.stderr


def test_kernels_are_recomputed_compiled_and_sharded(runs: dict[str, Any]) -> None:
    assert_same(runs["triton_fsdp_compiled"], runs["triton"])


def test_a_broken_weight_of_one_rank_stops_all(runs: dict[str, Any]) -> None:
    first, second = runs["broken_shard"]
    assert first == second and first.startswith("weights are not finite after step 2, 1 of 31")


def test_processes_that_were_launched_are_ended() -> None:
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), 2, 1)
    launcher.procs = [subprocess.Popen(["sleep", "60"])]
    strategies.end_together(SimpleNamespace(strategy=SimpleNamespace(launcher=launcher)))
    assert launcher.procs[0].wait() == -signal.SIGKILL


@pytest.mark.parametrize(("environment", "waits"), [(LightningEnvironment, 1), (object, 0)])
def test_a_launched_process_waits_to_be_ended(monkeypatch, environment: type, waits: int) -> None:
    """It has a launcher too, that has launched nothing; torchrun's ranks leave by themselves."""
    waited: list[float] = []
    monkeypatch.setattr(strategies.time, "sleep", waited.append)
    launcher = _SubprocessScriptLauncher(LightningEnvironment(), 2, 1)
    strategy = SimpleNamespace(launcher=launcher, cluster_environment=environment())
    strategies.end_together(SimpleNamespace(strategy=strategy, is_global_zero=False))
    assert len(waited) == waits


def test_torchrun_trains_from_the_same_configs(tmp_path: Path) -> None:
    (tmp_path / "corpus.txt").write_text(squares(900))
    torchrun = "import sys; from torch.distributed.run import main; main(sys.argv[1:])"
    launcher = ["--standalone", "--nproc-per-node", "2", "--start-method", "fork", "--run-path"]
    sharded = ["trainer=fsdp", "trainer.strategy.save_distributed_checkpoint=true"]
    on_cpu = ["trainer.accelerator=cpu", "trainer.devices=2", "attention.backend=reference"]
    own = ["run_dir=outputs/mine", "activation_checkpointing=selective"]
    short = ["trainer.max_steps=2", "val_every_n_steps=2", "test=false", "logger=csv"]
    command = [*launcher, str(ROOT / "train.py"), *TINY[1:], *sharded, *on_cpu, *short, *own]
    environment = {"NSA_DATA_DIR": str(tmp_path / "data")}
    done = forked_runs.python(torchrun, *command, cwd=tmp_path, environment=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "outputs" / "mine"
    assert done.stdout.count("2 × cpu") == 1
    rows = forked_runs.rows_of(run)
    assert [row["step"] for row in rows if row["train/loss"]] == ["1", "2"]
    last = run / "checkpoints" / "last.ckpt"
    assert last.readlink() == Path("step_2.ckpt") and (last / "__1_0.distcp").is_file()
