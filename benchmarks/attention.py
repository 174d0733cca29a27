"""Time and measure one attention layer: `make bench`, or `python -m benchmarks.attention --help`.

Each row is a whole layer (norm, projections, attention, gates) at the sizes of `nsa_small`: its
forward pass and a training step, appended to benchmarks/results.csv with what it ran on.
"""

import argparse
import csv
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import nn

from nsa.attention import Attention, SparseAttention, WindowAttention

DIM, DIM_HEAD, HEADS, KV_HEADS = 512, 64, 8, 2
SIZES = dict(
    sliding_window_size=64,
    compress_block_size=8,
    compress_block_sliding_stride=4,
    selection_block_size=16,
    num_selected_blocks=8,
)
LAYERS: dict[str, Callable[[], nn.Module]] = {
    "nsa reference": lambda: SparseAttention(
        DIM, DIM_HEAD, HEADS, **SIZES, kv_heads=KV_HEADS, backend="reference"
    ),
    "window reference": lambda: WindowAttention(
        DIM, DIM_HEAD, HEADS, SIZES["sliding_window_size"], KV_HEADS, backend="reference"
    ),
    "dense sdpa": lambda: Attention(DIM, DIM_HEAD, HEADS, KV_HEADS),
}
RESULTS = Path(__file__).with_name("results.csv")


def milliseconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The median wall time of a call, after three warm-up calls."""
    times = []
    for _ in range(repeats + 3):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[3:])


def measure(
    layer: nn.Module, num_tokens: int, batch: int, device: torch.device, repeats: int
) -> dict[str, float | str]:
    """Forward and forward + backward in ms; peak memory in MiB above weights and input (CUDA)."""
    layer = layer.to(device)
    tokens = torch.randn(batch, num_tokens, DIM, device=device, requires_grad=True)

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return layer(tokens)

    def step() -> None:
        out = forward()
        out.backward(torch.ones_like(out))

    with torch.no_grad():
        forward_ms = milliseconds(forward, device, repeats)
    step()
    peak: float | str = ""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        step()
        peak = round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)
    step_ms = milliseconds(step, device, repeats)
    return {"forward_ms": round(forward_ms, 3), "step_ms": round(step_ms, 3), "peak_mib": peak}


def environment(device: torch.device) -> dict[str, str]:
    """What a figure is worthless without."""
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False
    )
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name()
        if on_gpu
        else f"CPU, {torch.get_num_threads()} threads",
        "dtype": "bf16 autocast" if on_gpu else "float32",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "date": date.today().isoformat(),
        "commit": commit.stdout.strip(),
        "command": f"python -m benchmarks.attention {' '.join(sys.argv[1:])}".strip(),
    }


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--commit", help="of a copy without its git history")
    parser.add_argument("--out", type=Path, default=RESULTS)
    return parser.parse_args()


def main() -> None:
    options = parse()
    where = environment(options.device)
    where["commit"] = options.commit or where["commit"] or "unknown"
    is_new = not options.out.exists()
    with options.out.open("a", newline="") as file:
        writer = None
        for num_tokens in options.tokens:
            for name, build in LAYERS.items():
                figures = measure(
                    build(), num_tokens, options.batch, options.device, options.repeats
                )
                row = (
                    {"layer": name, "tokens": num_tokens, "batch": options.batch} | figures | where
                )
                if writer is None:
                    writer = csv.DictWriter(file, row)
                    if is_new:
                        writer.writeheader()
                writer.writerow(row)
                shown = "  ".join(f"{value:>10}" for value in figures.values())
                print(
                    f"{name:>18}  T {num_tokens:>6}  {shown}  (fwd ms, fwd+bwd ms, MiB)", flush=True
                )


if __name__ == "__main__":
    main()
