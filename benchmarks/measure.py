"""What the benchmarks share: time, memory, where a figure comes from, and results.csv."""

import csv
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from nsa.config import NSAConfig

RESULTS = Path(__file__).with_name("results.csv")
COLUMNS: tuple[str, ...] = (
    "suite",  # op, layer, train_step, presets, scaling or decode
    "op",
    "backend",
    "heads",
    "kv_heads",
    "dim_head",
    "tokens",  # of one sequence
    "batch",
    "dtype",
    "sizes",  # of NSA: w, l, d, l' and n; of scaling: weak or strong
    "status",  # ok, oom, refused (its check failed) or failed, with the reason
    "forward_ms",
    "backward_ms",
    "step_ms",  # forward and backward; of train_step: a whole training step
    "peak_mib",  # above weights and inputs; of train_step: all that was allocated
    "tokens_per_second",
    "mfu",
    "gpu_busy",  # share of a step in which the GPU works; the rest waits for the host
    "check",  # what the judge said: the largest error over its budget
    "device",
    "torch",
    "triton",
    "cudnn",
    "python",
    "date",  # when the run began: the same in all of its rows
    "commit",
    "command",
)
Row = Mapping[str, Any]


# ---- time and memory ------------------------------------------------------------


def milliseconds(
    run: Callable[[], object],
    device: torch.device,
    *,
    seconds: float = 0.25,
    least: int = 3,
    most: int = 30,
) -> float:
    """The median time of a call, after one that compiles and one that warms up.

    On a GPU between events, the L2 cache flushed before every call and the host never waiting in
    between: what is short is bound by how fast the host launches, as in a training step.
    """
    times = event_times if device.type == "cuda" else clock_times
    run()
    estimate = times(run, 1)[0]
    count = int(1e3 * seconds / max(estimate, 1e-3))
    return statistics.median(times(run, min(most, max(least, count))))


def event_times(run: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of each call on the current GPU."""
    flush = larger_than_cache(torch.cuda.current_device())
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
    for start, stop in events:
        flush.zero_()
        start.record()
        run()
        stop.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(stop) for start, stop in events]


def clock_times(run: Callable[[], object], count: int) -> list[float]:
    """Milliseconds of each call on the host."""
    readings = [time.perf_counter()]
    for _ in range(count):
        run()
        readings.append(time.perf_counter())
    return [1e3 * (b - a) for a, b in pairwise(readings)]


@cache
def larger_than_cache(device: int) -> Tensor:
    """Writing to it drives everything else out of the L2 cache."""
    size = 4 * torch.cuda.get_device_properties(device).L2_cache_size
    return torch.empty(size, dtype=torch.int8, device=device)


def forward_and_backward(
    op: Callable[..., Any], inputs: Sequence[Tensor], device: torch.device, seconds: float = 0.25
) -> dict[str, float]:
    """Milliseconds of the forward pass, without a graph, and of the backward pass."""
    with torch.no_grad():
        forward = milliseconds(lambda: op(*inputs), device, seconds=seconds)
    leaves = [x.detach().requires_grad_() for x in inputs]
    outs = as_tuple(op(*leaves))
    douts = [torch.randn_like(out) for out in outs]
    backward = milliseconds(
        lambda: torch.autograd.grad(outs, leaves, douts, retain_graph=True), device, seconds=seconds
    )
    return {"forward_ms": forward, "backward_ms": backward, "step_ms": forward + backward}


def step_memory(op: Callable[..., Any], inputs: Sequence[Tensor], device: torch.device) -> float:
    """MiB above the inputs in a forward and backward pass.

    Counted: outputs and what comes back for them, saved tensors, workspaces, gradients of inputs.
    """
    leaves = [x.detach().requires_grad_() for x in inputs]

    def step() -> None:
        outs = as_tuple(op(*leaves))
        torch.autograd.grad(outs, leaves, [torch.randn_like(out) for out in outs])

    return peak_mib(step, device)


def peak_mib(run: Callable[[], object], device: torch.device) -> float:
    """The most a call allocates on a GPU above what was there; NaN on a CPU."""
    if device.type != "cuda":
        return float("nan")
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def busy_milliseconds(run: Callable[[], object], calls: int = 3) -> float:
    """GPU time of a call in which a kernel or a copy runs, as the profiler sees it."""
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    ranges = sorted(
        (event.time_range.start, event.time_range.end)
        for event in trace.events() or []
        # Ranges that a program names span the gaps between its kernels.
        if event.device_type.name == "CUDA" and not event.is_user_annotation
    )
    return covered(ranges) / 1e3 / calls


def covered(ranges: Sequence[tuple[float, float]]) -> float:
    """The length of the union of ranges that are sorted by their start."""
    total, reached = 0.0, float("-inf")
    for start, end in ranges:
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def as_tuple(outs: Any) -> tuple[Tensor, ...]:
    return tuple(outs) if isinstance(outs, tuple | list) else (outs,)


# ---- where a figure comes from ------------------------------------------------------------


def environment(
    device: torch.device, *, date: str, command: str, commit: str | None = None
) -> dict[str, str]:
    """What a figure is worthless without; `commit` names that of a copy without its history."""
    name = f"CPU, {torch.get_num_threads()} threads"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    cudnn = torch.backends.cudnn.version() if device.type == "cuda" else None
    return {
        "device": name,
        "torch": torch.__version__,
        "triton": version_of("triton") or "",
        "cudnn": str(cudnn or ""),
        "python": platform.python_version(),
        "date": date,
        "commit": commit or commit_here(),
        "command": command,
    }


def now() -> str:
    return datetime.now().isoformat(timespec="seconds")


def commit_here() -> str:
    """The commit of this checkout, -dirty where something differs; `unknown` without history."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude=*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
        )
    except FileNotFoundError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def version_of(package: str) -> str | None:
    """The installed version of a package, None where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def sizes_of(cfg: NSAConfig) -> str:
    """NSA's sizes in the paper's letters."""
    return (
        f"w{cfg.sliding_window_size} l{cfg.compress_block_size} "
        f"d{cfg.compress_block_sliding_stride} l'{cfg.selection_block_size} "
        f"n{cfg.num_selected_blocks}"
    )


# ---- results.csv ------------------------------------------------------------


def append(path: Path, *rows: Row) -> None:
    """Add rows to a results file, making it if there is none; columns a row lacks stay empty.

    Raises:
        ValueError: for a column that is not in COLUMNS, in a row or in the file.
    """
    for row in rows:
        if unknown := set(row) - set(COLUMNS):
            raise ValueError(f"row has columns {sorted(unknown)} that benchmarks.measure lacks")
    is_new = not path.exists() or os.path.getsize(path) == 0
    if not is_new:
        read(path)
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerows({name: written(value) for name, value in row.items()} for row in rows)


def written(value: Any) -> Any:
    """Four significant digits and more of a float; nothing for one that is not a number."""
    if not isinstance(value, float):
        return value
    return "" if value != value else round(value, 4 if abs(value) < 10 else 2)


def read(path: Path) -> list[dict[str, str]]:
    """The rows of a results file, every value as text."""
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        rows = list(reader)
    if tuple(reader.fieldnames or ()) != COLUMNS:
        raise ValueError(
            f"{path} has the columns {reader.fieldnames}: it must have those of "
            "benchmarks.measure.COLUMNS; write to another file with --out"
        )
    return rows
