"""Runs on one and on several processes, for test_parallel.py and test_checkpoints.py.

python parallel_runs.py FOLDER [NAME…] makes `RUNS` in a folder each and writes what they saw to
FOLDER/<name>.json. Ranks are forked from this one process, which imported everything and trained
nothing: autograd's threads would not survive a fork.
"""

import importlib
import json
import math
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partialmethod
from pathlib import Path
from typing import Any

import forked_runs
import lightning as L
import torch
import torch.distributed as dist
import vectorised_interpreter
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from test_train import ADAMW, ATTENTION, COSINE, MODEL
from torch import nn
from torch.utils.data import DataLoader

from callbacks.guard import Guard
from callbacks.step_checkpoint import StepCheckpoint
from data.metrics import BITS_PER_BYTE
from nsa.training import cuda_graphs, parallel
from nsa.training.lightning_module import NSALightningModule
from nsa.training.replicas import ReplicaStrategy
from runs import checkpoints, strategies

ROOT = Path(__file__).parent.parent
STEPS, VOCAB, SEQ_LEN = 4, 7, 12


class Rows(L.LightningDataModule):
    """Step k trains on the same rows however many ranks share them; so does validation."""

    metric = BITS_PER_BYTE

    def __init__(self, batch: int) -> None:
        super().__init__()
        self.batch = batch

    def rows(self, step: int) -> dict[str, torch.Tensor]:
        own = self.batch // self.trainer.world_size
        starts = step * self.batch + self.trainer.global_rank * own + torch.arange(own)
        numbers = starts[:, None] * 5 + torch.arange(SEQ_LEN + 1) * (1 + starts[:, None] % 3)
        return {"tokens": numbers % VOCAB}

    def train_dataloader(self) -> DataLoader:
        last, first = self.trainer.max_steps, self.trainer.global_step
        steps = [*range(first, last), *range(first)]  # as long as the whole run
        return DataLoader([self.rows(step) for step in steps], batch_size=None)

    def val_dataloader(self) -> DataLoader:
        return DataLoader([self.rows(100)], batch_size=None)

    def bytes_per_token(self, split: str) -> float:
        return 1.0

    def state_dict(self) -> dict[str, Any]:
        return {"tokenizer": None}  # bytes


class Seen(L.Callback):
    """What each step logged."""

    def __init__(self) -> None:
        self.steps: dict[int, list[float]] = {}

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        names = ("train/loss", "optim/grad_norm")
        self.steps[trainer.global_step] = [trainer.callback_metrics[n].item() for n in names]


def strategy_of(kind: str) -> Strategy | str:
    if kind.startswith("fsdp"):
        return strategies.FSDP2Strategy(
            save_distributed_checkpoint=kind.endswith("folder"),
            reshard_after_forward=False if kind.endswith("kept") else "auto",
        )
    if kind == "replicas":
        return ReplicaStrategy()
    return "ddp" if kind == "ddp" else "auto"


def fit(
    kind: str, folder: Path, *callbacks: L.Callback, batch: int = 4, **options: Any
) -> dict[str, Any]:
    """Train as `kind` says, in every rank of a run; what it saw."""
    torch.manual_seed(0)
    own = {"compile", "activation_checkpointing", "cross_entropy"} & options.keys()
    module_options = {name: options.pop(name) for name in own}
    model = MODEL | options.pop("model", {})
    module = NSALightningModule(model, ADAMW, COSINE, **module_options)
    seen = Seen()
    ckpt_path = options.pop("ckpt_path", None)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy=strategy_of(kind),
        callbacks=[seen, *callbacks],
        plugins=[checkpoints.WholeCheckpointIO()],
        default_root_dir=folder,
        **{"max_steps": STEPS, "gradient_clip_val": 1.0, "max_epochs": -1} | options,
        use_distributed_sampler=False,
        log_every_n_steps=1,
        val_check_interval=100,  # not while it trains
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = Rows(batch)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    result: dict[str, Any] = {"steps": seen.steps}
    if callbacks:
        result |= trainer.validate(module, datamodule=data, verbose=False)[0]
        result["flops"] = module.model.flops_per_token(SEQ_LEN)
    return result


def saver(folder: Path, every: int = 2, keep: int = 2) -> StepCheckpoint:
    return StepCheckpoint(
        folder,
        "step_{step}",
        monitor="step",
        mode="max",
        save_top_k=keep,
        every_n_train_steps=every,
        save_last="link",
        auto_insert_metric_name=False,
        enable_version_counter=False,
    )


def trained(kind: str, **options: Any) -> Callable[[Path], Any]:
    return lambda folder: fit(kind, folder, **options)


def saved(kind: str) -> Callable[[Path], Any]:
    return lambda folder: fit(kind, folder, saver(folder))


def resumed(kind: str, writer: str) -> Callable[[Path], Any]:
    def run(folder: Path) -> dict[str, Any]:
        return fit(kind, folder, ckpt_path=folder.parent / writer / "step_2.ckpt")

    return run


def retained(folder: Path) -> list[str]:
    """Keep one folder of those of three steps, and the best of one."""
    best = ModelCheckpoint(folder, "best_{step}", monitor="train/loss", every_n_train_steps=1)
    fit("fsdp_folder", folder, saver(folder, every=1, keep=1), best, max_steps=3)
    return sorted(path.name for path in folder.iterdir())


class FullDisk(L.Callback):
    """From step 3 on no file can grow beyond 20 kB."""

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:
        if trainer.global_step == 3:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))


def full_disk(kind: str) -> Callable[[Path], Any]:
    def run(folder: Path) -> list[str]:
        try:
            fit(kind, folder, saver(folder), FullDisk())
        except checkpoints.NotWritten as error:
            message = str(error)
        return [message] if kind == "one" else strategies.gathered(message)

    return run


def killed(folder: Path) -> None:
    """Rank zero dies when all of the second folder is written but its name."""
    publish = checkpoints.publish

    def die(path: Path, manifest: dict) -> None:
        if path.name == "step_4.ckpt":
            os._exit(0)
        publish(path, manifest)

    checkpoints.publish = die
    try:
        fit("fsdp_folder", folder, saver(folder))
    except RuntimeError:  # rank one misses rank zero
        os._exit(0)


def goes_on(folder: Path) -> list[str]:
    """The killed run, from its last checkpoint."""
    folder = folder.parent / "killed"
    before = [path.name for path in folder.iterdir()]
    fit("fsdp_folder", folder, saver(folder), ckpt_path=folder / "last.ckpt")
    return before


class BrokenShard(L.Callback):
    """After step 2 a weight is not finite, in the part that rank one holds."""

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *_: Any) -> None:
        if (trainer.global_step, trainer.global_rank) == (2, 1):
            module.model.head.weight.to_local().data[0, 0] = math.nan


def broken_shard(folder: Path) -> list[str]:
    try:
        fit("fsdp", folder, BrokenShard(), Guard(), saver(folder))
    except FloatingPointError as error:
        message = str(error)
    return strategies.gathered(message)


def replayed(folder: Path) -> dict[str, Any]:
    """With what a CPU has in place of a graph: the function that it would be recorded from."""
    cuda_graphs.check_device = lambda device: None
    cuda_graphs.MicroBatchGraph = lambda learn, batch: learn
    nn.Module.compile = lambda block: None
    return fit("replicas", folder, saver(folder), compile=parallel.REPLAYED)


BF16 = {"precision": "bf16-mixed", "gradient_clip_val": 0.0}
NSA = {"depth": 1, "layer_pattern": ["nsa"], "attention": ATTENTION | {"backend": "triton"}}
TRITON = {"model": NSA, "max_steps": 2, "batch": 2}
DENSE = {"model": {"layer_pattern": ["dense"], "dropout": 0.3}}
LEAN = {"activation_checkpointing": "full", "cross_entropy": "chunked"}
COMPILED = {"compile": True, "activation_checkpointing": "selective"}

Run = tuple[int, Callable[[Path], Any]]  # how many ranks, what each does
RUNS: dict[str, Run] = {
    "one": (1, saved("one")),
    "ddp": (2, saved("ddp")),
    "replicas": (2, replayed),
    "fsdp": (2, saved("fsdp")),
    "fsdp_folder": (2, saved("fsdp_folder")),
    "fsdp_kept_lean": (2, trained("fsdp_kept", **LEAN)),
    "ddp_bf16": (2, trained("ddp", **BF16)),
    "fsdp_bf16": (2, trained("fsdp", **BF16)),
    "dense": (1, trained("one", **DENSE)),
    "dense_compiled": (1, trained("one", **DENSE, **COMPILED)),
    "triton": (1, trained("one", **TRITON)),
    "triton_fsdp_compiled": (2, trained("fsdp", **TRITON, **COMPILED)),
    "ddp_to_fsdp": (2, resumed("fsdp", "ddp")),
    "fsdp_to_ddp": (2, resumed("ddp", "fsdp")),
    "fsdp_to_one": (1, resumed("one", "fsdp")),
    "one_to_fsdp": (2, resumed("fsdp", "one")),
    "folder_to_fsdp": (2, resumed("fsdp", "fsdp_folder")),
    "folder_to_fsdp_of_one": (1, resumed("fsdp", "fsdp_folder")),
    "folder_to_ddp": (2, resumed("ddp", "fsdp_folder")),
    "folder_to_one": (1, resumed("one", "fsdp_folder")),
    "retained": (2, retained),
    "full_disk_one": (1, full_disk("one")),
    "full_disk_fsdp": (2, full_disk("fsdp")),
    "full_disk_folder": (2, full_disk("fsdp_folder")),
    "killed": (2, killed),
    "goes_on": (2, goes_on),
    "broken_shard": (2, broken_shard),
}


def in_ranks(world: int, run: Callable[[Path], Any], folder: Path) -> None:
    """Fork the ranks of a run; rank zero writes what it returns, or each why it failed."""
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "GROUP_RANK": "0",
        "TORCHELASTIC_RUN_ID": folder.name,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    children = []
    for rank in range(world):
        if (child := os.fork()) == 0:
            os.environ |= shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            os._exit(one_rank(rank, run, folder))
        children.append(child)
    for child in children:
        os.waitpid(child, 0)


def one_rank(rank: int, run: Callable[[Path], Any], folder: Path) -> int:
    try:
        result = run(folder)
        if rank == 0:
            folder.with_suffix(".json").write_text(json.dumps(result))
    except BaseException:
        folder.with_suffix(f".{rank}.error").write_text(traceback.format_exc())
    return 0


def results(folder: Path, names: Sequence[str]) -> dict[str, Any]:
    """What runs saw, made in a process of its own: checks of shapes are not for a compiler."""
    program = "import parallel_runs, sys; parallel_runs.make(sys.argv[1], sys.argv[2:])"
    done = forked_runs.python(program, str(folder), *names)
    errors = [path.read_text() for path in folder.glob("*.error")]
    assert done.returncode == 0 and not errors, "\n".join([done.stderr, *errors])
    return {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}


def make(place: str, names: Sequence[str]) -> None:
    vectorised_interpreter.install()
    torch.set_num_threads(1)
    nn.Module.compile = partialmethod(nn.Module.compile, backend="aot_eager", fullgraph=True)
    if any("compiled" in name for name in names or RUNS):
        importlib.import_module("torch._inductor.pattern_matcher")  # each rank would by itself
    for name in names or RUNS:
        began = time.monotonic()
        folder = Path(place, name)
        folder.mkdir(exist_ok=True)
        in_ranks(*RUNS[name], folder)
        print(f"{name} {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    make(sys.argv[1], sys.argv[2:])
