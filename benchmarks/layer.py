"""A whole layer (norm, projections, attention, gates) at the sizes of `nsa_small`, by backend."""

from typing import Any

import torch
from torch import nn

from benchmarks.measure import milliseconds, peak_mib, sizes_of
from benchmarks.workers import Job, Row, Unavailable, attempt
from nsa.attention import Attention, SparseAttention, WindowAttention
from nsa.backends import resolve_backend
from nsa.config import NSAConfig

DIM, DIM_HEAD, HEADS, KV_HEADS = 512, 64, 8, 2
SIZES: dict[str, Any] = dict(
    sliding_window_size=64,
    compress_block_size=8,
    compress_block_sliding_stride=4,
    selection_block_size=16,
    num_selected_blocks=8,
)
LAYERS = ("nsa reference", "nsa triton", "window reference", "window triton", "dense sdpa")


def build(kind: str, backend: str) -> nn.Module:
    if kind == "dense":
        return Attention(DIM, DIM_HEAD, HEADS, KV_HEADS)
    try:
        resolve_backend(backend)
    except ValueError as error:
        raise Unavailable(str(error)) from error
    if kind == "window":
        window = SIZES["sliding_window_size"]
        return WindowAttention(DIM, DIM_HEAD, HEADS, window, KV_HEADS, backend=backend)
    return SparseAttention(DIM, DIM_HEAD, HEADS, **SIZES, kv_heads=KV_HEADS, backend=backend)


def columns(job: Job, batch: int, device: torch.device) -> dict:
    kind, backend = job[0].split()
    return {
        "suite": "layer",
        "op": kind,
        "backend": backend,
        "heads": HEADS,
        "kv_heads": KV_HEADS,
        "dim_head": DIM_HEAD,
        "tokens": job[1],
        "batch": batch,
        "dtype": "bf16 autocast" if device.type == "cuda" else "float32",
        "sizes": sizes_of(NSAConfig(**SIZES)),
    }


def measure_layer(job: Job, batch: int, device: torch.device, seconds: float) -> Row:
    """Forward, without a graph, and a training step's forward and backward pass together."""
    torch.manual_seed(0)
    layer = build(*job[0].split()).to(device)
    tokens = torch.randn(batch, job[1], DIM, device=device, requires_grad=True)
    leaves = [tokens, *layer.parameters()]

    def forward() -> torch.Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            return layer(tokens)

    def step() -> None:
        out = forward()
        torch.autograd.grad(out, leaves, torch.ones_like(out))

    def take() -> Row:
        with torch.no_grad():
            forward_ms = milliseconds(forward, device, seconds=seconds)
        step_ms = milliseconds(step, device, seconds=seconds)
        peak = peak_mib(step, device)
        return {"forward_ms": forward_ms, "step_ms": step_ms, "peak_mib": peak}

    return columns(job, batch, device) | attempt(take)
