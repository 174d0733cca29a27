"""Do steps replayed as CUDA graphs learn what eager steps learn, how fast, by which kernels?

`python -m benchmarks.probes.graph_steps` needs a GPU. First 20 steps of one model through
Lightning, of two micro-batches, clipped: eager, compiled, replayed, replayed again. Then the time
of a replayed step of presets, and what it launches. A part that fails says why; the table is last.
"""

import argparse
import logging
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch.profiler import DeviceType, ProfilerActivity, profile
from torch.utils.data import DataLoader

from benchmarks import measure, train_step
from data.metrics import BITS_PER_BYTE
from nsa.training.lightning_module import NSALightningModule

STEPS, ACCUMULATED, LENGTH = 20, 2, 256
SCHEDULE = {"name": "cosine", "warmup_steps": 5, "min_lr_ratio": 0.1}
TIMED = (  # size, job, tokens a step
    ("small", "nsa triton graphs", 1024, 32768),
    ("small", "dense sdpa graphs", 1024, 32768),
    ("small", "nsa triton", 1024, 32768),
    ("medium", "nsa triton graphs", 8192, 8192),
    ("medium", "nsa triton graphs", 8192, 65536),
    ("medium", "dense sdpa graphs", 8192, 65536),
    ("example", "nsa triton graphs", 8192, 8192),
    ("example", "nsa triton graphs", 512, 8192),
)


class Random(L.LightningDataModule):
    """The same random tokens each time, with a pattern to learn."""

    metric = BITS_PER_BYTE

    def train_dataloader(self) -> DataLoader:
        draw = torch.Generator().manual_seed(0)
        shape = (STEPS * ACCUMULATED, 4, LENGTH + 1)
        tokens = torch.randint(64, shape, generator=draw).cumsum(-1) % 64
        rows: Any = [{"tokens": each} for each in tokens]
        return DataLoader(rows, batch_size=None)

    def bytes_per_token(self, split: str) -> float:
        return 1.0


class Steps(L.Callback):
    """Loss and gradient norm of every step."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.norms: list[float] = []

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, *_: Any) -> None:
        if trainer.global_step > len(self.losses):
            self.losses.append(pl_module.step_losses.mean().item())
            self.norms.append(pl_module.grad_norm.item())


def learned(compile: bool | str, **changes: Any) -> tuple[Steps, torch.Tensor]:
    """20 steps through a Trainer: what each of them said, and the weights."""
    options = train_step.model_options("tiny", "nsa", "triton", LENGTH)
    torch._dynamo.reset()
    torch.manual_seed(0)
    module = NSALightningModule(
        options["model"] | {"name": "probe"} | changes, options["optimizer"], SCHEDULE, compile
    )
    steps = Steps()
    trainer = L.Trainer(
        accelerator="gpu", devices=1, precision="bf16-mixed", max_steps=STEPS, max_epochs=-1,
        accumulate_grad_batches=ACCUMULATED, gradient_clip_val=1.0, callbacks=[steps],
        logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=Random())
    return steps, torch.cat([p.detach().flatten() for p in module.parameters()])


def compare(what: str, changes: dict[str, Any], rows: list[str]) -> None:
    """Graphs against eager and compiled steps: the largest differences."""
    runs = {name: learned(name, **changes) for name in (False, True, "reduce-overhead")}
    again = learned("reduce-overhead", **changes)
    eager, graphs = runs[False][0], runs["reduce-overhead"][0]
    print(what, "losses eager", [f"{x:.4f}" for x in eager.losses[::4]])
    print(what, "losses graph", [f"{x:.4f}" for x in graphs.losses[::4]])
    for name in (True, "reduce-overhead"):
        steps, weights = runs[name]
        loss = largest(steps.losses, eager.losses)
        first = abs(steps.norms[0] - eager.norms[0]) / eager.norms[0]
        norm = largest([x / y for x, y in zip(steps.norms, eager.norms, strict=True)], [1] * STEPS)
        apart = (weights - runs[False][1]).abs().max().item()
        rows.append(
            f"{what}: compile={name} against eager: loss {loss:.2g}, first grad norm {first:.2g}, "
            f"grad norms {norm:.2g} (relative), weights {apart:.2g}"
        )
    same = again[0].losses == graphs.losses and torch.equal(again[1], runs["reduce-overhead"][1])
    rows.append(f"{what}: replayed twice, bit for bit the same: {same}")


def largest(x: list[float], y: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(x, y, strict=True))


def options_of(size: str, length: int, per_step: int) -> argparse.Namespace:
    words = f"--sizes {size} --kinds nsa --tokens {length} --tokens-per-step {per_step}"
    return train_step.parse([*words.split(), "--device", "cuda"])


def timed(size: str, job: str, length: int, per_step: int, rows: list[str], seconds: float) -> None:
    """One row of the table, and what a step launches."""
    began = time.monotonic()
    torch.cuda.empty_cache()
    step = train_step.build(size, (job, length), options_of(size, length, per_step))
    step()
    torch.cuda.synchronize()
    ready = time.monotonic() - began
    row = train_step.measure_step(step, seconds)
    name = f"{size} {job} {length} x {per_step // length}"
    rows.append(
        f"{name}: {row['step_ms']:.2f} ms, {row['tokens_per_second']:,.0f} tokens/s, busy "
        f"{row['gpu_busy']:.3f}, mfu {row.get('mfu', 0):.3f}, {row['peak_mib'] / 1024:.1f} GiB, "
        f"ready in {ready:.0f} s"
    )
    launches(name, step)


def launches(name: str, step: Callable[[], Any], most: int = 45) -> None:
    """The kernels of a step by time, and what the host called."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as trace:
        step()
        torch.cuda.synchronize()
    count: Counter[str] = Counter()
    micros: Counter[str] = Counter()
    host: Counter[str] = Counter()
    for event in trace.events() or ():
        if event.device_type == DeviceType.CUDA:
            count[event.name] += 1
            micros[event.name] += event.device_time
        elif event.name.startswith(
            ("cudaGraphLaunch", "cuLaunch", "cudaLaunch", "cudaMemcpyAsync")
        ):
            host[event.name] += 1
    total, kernels = sum(micros.values()), sum(count.values())
    print(f"\n{name}: {kernels} kernels, {total / 1e3:.2f} ms; host {dict(host)}")
    for kernel, time_taken in micros.most_common(most):
        print(f"  {time_taken / 1e3:8.3f} ms  {count[kernel]:5}  {kernel[:110]}")


def through_train(rows: list[str], folder: Path, *overrides: str) -> None:
    """A preset as a user types it, on text made up here."""
    text = folder / "text.txt"
    if not text.exists():
        text.write_text("".join(f"{i} times {i} makes {i * i}.\n" for i in range(400_000)))
    command = [sys.executable, "train.py", "data=text", f"data.paths=[{text}]", *overrides]
    command += ["logger=csv", "test=false", "val_every_n_steps=100000", "data.val_tokens=70000"]
    command += ["callbacks.samples=null", "callbacks.attention_statistics=null"]
    began = time.monotonic()
    done = subprocess.run(
        command, env=os.environ | {"NSA_DATA_DIR": str(folder)}, capture_output=True, text=True,
        timeout=100,
    )  # fmt: skip
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    print("\n", " ".join(overrides), "\n", "\n".join(lines[-14:]), "\n", done.stderr[-1500:])
    spent = time.monotonic() - began
    rows.append(f"{' '.join(overrides)}: rc {done.returncode}, {spent:.0f} s: {lines[-3:]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4.0)
    parser.add_argument("--seconds", type=float, default=1.0, help="of repeating a step")
    options = parser.parse_args()
    stop = time.monotonic() + 60 * options.minutes
    logging.getLogger("lightning").setLevel(logging.WARNING)
    rows: list[str] = []
    folder = Path(tempfile.mkdtemp())
    steps = "trainer.max_steps=60"
    checks: list[Callable[[], None]] = [
        lambda: compare("no dropout", {}, rows),
        *(
            lambda each=each: timed(*each, rows, options.seconds)  # type: ignore[misc]
            for each in TIMED
        ),
        lambda: through_train(rows, folder, "model=nsa_small", steps),
        lambda: through_train(rows, folder, "model=nsa_small", "trainer.max_steps=300"),
        lambda: through_train(
            rows, folder, "model=nsa_medium", "trainer.max_steps=20", "batch.micro_batch_size=8"
        ),
        lambda: compare("dropout .1", {"dropout": 0.1}, rows),
    ]
    for check in checks:
        if time.monotonic() > stop:
            rows.append("no time left for the rest")
            break
        try:
            check()
        except BaseException as error:
            traceback.print_exc()
            rows.append(f"failed: {type(error).__name__}: {str(error)[:300]}")
        print(f"[{time.monotonic() - stop + 60 * options.minutes:.0f} s]", flush=True)
    print("\n" + measure_line())
    print("\n".join(rows))


def measure_line() -> str:
    return f"{torch.cuda.get_device_name()}, torch {torch.__version__}, busy by {measure.__name__}"


if __name__ == "__main__":
    main()
