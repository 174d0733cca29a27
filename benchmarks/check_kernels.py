"""Check every kernel and gradient on this GPU, then time every part against dense cuDNN attention.

    python -m benchmarks.check_kernels                 # all of it, within --minutes
    python -m benchmarks.check_kernels --only check    # or: time
    python -m benchmarks.check_kernels --case small    # the cases and layouts whose name holds it

Checks judge a kernel by the float64 reference: it may err as much as the reference in the inputs'
dtype does, twice over (plus a few rounding steps of the largest value). Every case and every timed
layout is a process of its own, so that one that fails, hangs or breaks the GPU context costs only
itself. A number after an output's name is its error over its budget; `same` says that a second run
gave the same bits.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field

import torch
import triton
from torch import Tensor

import nsa.kernels as kernels
from nsa import blocks, reference
from nsa.config import NSAConfig
from nsa.kernels import lists, selected

PAPER = dict(
    sliding_window_size=512, compress_block_size=32, compress_block_sliding_stride=16,
    selection_block_size=64, num_selected_blocks=16,
)  # fmt: skip
SMALL = dict(
    sliding_window_size=64, compress_block_size=8, compress_block_sliding_stride=4,
    selection_block_size=16, num_selected_blocks=8,
)  # fmt: skip
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU only rehearses, in float32
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@dataclass(frozen=True)
class Case:
    """One set of sizes for every op."""

    B: int
    T: int
    H: int
    G: int
    D: int
    DV: int
    dtype: torch.dtype = BF16
    sizes: dict = field(default_factory=dict)
    per_head: bool = False
    logits: float = 1.0  # a factor on the queries
    memories: int = 0

    @property
    def cfg(self) -> NSAConfig:
        return NSAConfig(**self.sizes)


def small(**changes) -> dict:
    return SMALL | changes


CHECKS = {
    "paper 16/1 D128": Case(2, 1000, 16, 1, 128, 128, sizes=PAPER),
    "llama 8/2 D128": Case(1, 1000, 8, 2, 128, 128, sizes=PAPER | dict(num_selected_blocks=5)),
    "gqa 8/4 D64": Case(2, 1000, 8, 4, 64, 64, sizes=PAPER, memories=2),
    "mha 4/4 D128": Case(1, 1000, 4, 4, 128, 128, sizes=PAPER | dict(num_selected_blocks=6)),
    "small 8/2 D64": Case(2, 1024, 8, 2, 64, 64, sizes=SMALL),
    "long 4/2 D64": Case(1, 8192, 4, 2, 64, 64, sizes=PAPER),
    "fp16 6/2 D80/48 acausal": Case(
        1, 500, 6, 2, 80, 48, FP16, small(causal=False), memories=1
    ),
    "fp32 8/2 D64": Case(1, 500, 8, 2, 64, 64, FP32, SMALL, memories=1),
    "fp32 4/2 D128/64 acausal": Case(1, 200, 4, 2, 128, 64, FP32, small(causal=False)),
    "fp32 2/1 D256": Case(1, 300, 2, 1, 256, 256, FP32, PAPER | dict(num_selected_blocks=3)),
    "deepseek 16/1 D192/128": Case(1, 500, 16, 1, 192, 128, sizes=PAPER),
    "wide 4/2 D256": Case(1, 500, 4, 2, 256, 256, sizes=PAPER | dict(num_selected_blocks=4)),
    "one token": Case(2, 1, 8, 4, 64, 64, sizes=SMALL),
    "17 tokens": Case(2, 17, 8, 4, 64, 64, sizes=PAPER),
    "100 tokens R3 D16": Case(2, 100, 6, 2, 16, 16, sizes=SMALL),
    "logits +-100": Case(1, 600, 8, 4, 64, 64, FP16, SMALL, logits=30.0),
    "per head, logit mean": Case(
        1, 600, 8, 2, 64, 64, sizes=small(importance="logit_mean"), per_head=True
    ),
    "blocks of 128": Case(
        1, 900, 8, 2, 128, 128, sizes=PAPER | dict(selection_block_size=128, num_selected_blocks=3)
    ),
    "odd sizes": Case(
        1, 700, 4, 1, 64, 64, sizes=dict(
            sliding_window_size=1, compress_block_size=20, compress_block_sliding_stride=16,
            selection_block_size=48, num_selected_blocks=5, num_local_blocks=1,
        ),
    ),
}  # fmt: skip

LAYOUTS = {
    "small 16x1024 8/2 D64": (16, 8, 2, 64, (1024,), SMALL),
    "paper 64/4 D128": (1, 64, 4, 128, (1024, 8192, 65536), PAPER),
    "llama 32/8 D128": (1, 32, 8, 128, (1024, 8192, 65536), PAPER),
    "gqa 8/4 D64": (1, 8, 4, 64, (1024, 8192, 65536), PAPER),
    "mha 16/16 D128": (1, 16, 16, 128, (1024, 8192, 65536), PAPER),
}


# ---- checks ------------------------------------------------------------


def poison_empty() -> None:
    """Memory that a kernel forgot to write reads as NaN."""
    for name in ("empty", "empty_like"):
        allocate = getattr(torch, name)

        def poisoned(*args, allocate=allocate, **kwargs):
            out = allocate(*args, **kwargs)
            return out.fill_(float("nan")) if out.is_floating_point() else out

        setattr(torch, name, poisoned)


def run_op(op: Callable, inputs: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """Outputs, then gradients of a fixed random functional of the outputs."""
    leaves = [x.detach().to(dtype or x.dtype).requires_grad_() for x in inputs]
    outs = op(*leaves)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    generator = torch.Generator(outs[0].device).manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64, device=outs[0].device)
    for out in outs:
        weight = torch.randn(out.shape, generator=generator, device=out.device)
        seen = torch.where(out.isfinite() & (out > -1e30), out, 0.0)
        loss = loss + (seen * weight.to(out.dtype)).sum().double()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    zeros = [torch.zeros_like(x) for x in leaves]
    return outs + [z if g is None else g for g, z in zip(grads, zeros, strict=True)]


def judge(op: Callable, oracle: Callable, inputs: Sequence[Tensor], names: str, dtype) -> str:
    """One line: error over budget for every output and gradient."""
    got, again = run_op(op, inputs, dtype), run_op(op, inputs, dtype)
    eager = run_op(oracle, inputs, dtype)
    rounded = [x.to(dtype).double() for x in inputs]
    want = run_op(oracle, rounded, torch.float64)
    words, failed = [], False
    top = max(finite_max(w) for w in want)
    for name, g, e, w in zip(names.split(), got, eager, want, strict=True):
        finite = w.isfinite() & (w > -1e30)
        error = (g.double() - w)[finite].abs().max().item() if finite.any() else 0.0
        allowed = (e.double() - w)[finite].abs().max().item() if finite.any() else 0.0
        budget = 2 * allowed + 4 * torch.finfo(g.dtype).eps * max(finite_max(w), 0.5 * top)
        wrong = not error <= budget or bool((g.isfinite() != w.isfinite()).any())
        failed |= wrong
        words.append(f"{name} {error / max(budget, 1e-30):.2f}{'!' if wrong else ''}")
    same = all(torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, again, strict=True))
    verdict = "ok  " if same and not failed else "FAIL"
    return f"{verdict} {' '.join(words)}{'' if same else ' NOT THE SAME TWICE'}"


def finite_max(x: Tensor) -> float:
    x = x[x.isfinite() & (x > -1e30)]
    return x.abs().max().item() if x.numel() else 0.0


def check_case(case: Case) -> None:
    poison_empty()
    torch.manual_seed(0)
    cfg, device, dtype = case.cfg, DEVICE, case.dtype
    B, T, H, G, D, DV = case.B, case.T, case.H, case.G, case.D, case.DV
    C = blocks.num_compress_blocks(T, cfg)

    def new(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=device)

    q, k, v = new(B, T, H, D) * case.logits, new(B, T, G, D), new(B, T, G, DV)
    k_cmp, v_cmp = new(B, C, G, D), new(B, C, G, DV)
    mem_k, mem_v = new(G, case.memories, D), new(G, case.memories, DV)
    q, k, v, k_cmp, v_cmp, mem_k, mem_v = (
        x.to(dtype).double() for x in (q, k, v, k_cmp, v_cmp, mem_k, mem_v)
    )

    def attempt(name: str, op, oracle, inputs, names: str) -> None:
        begin = time.time()
        try:
            line = judge(op, oracle, inputs, names, dtype)
        except Exception as error:
            line = f"FAIL {type(error).__name__}: {str(error)[:300]}"
        print(f"  {name:22s} {line}  ({time.time() - begin:.1f} s)", flush=True)

    memories = (mem_k, mem_v) if case.memories else ()
    attempt(
        "compressed",
        lambda q, k, v, *m: kernels.compressed_attention(q, k, v, cfg, *m),
        lambda q, k, v, *m: reference.compressed_attention(q, k, v, cfg, *m),
        (q, k_cmp, v_cmp, *memories),
        "out lse dq dk dv" + (" dmem_k dmem_v" if memories else ""),
    )
    attempt(
        "window",
        lambda q, k, v: kernels.sliding_window_attention(q, k, v, cfg),
        lambda q, k, v: reference.sliding_window_attention(q, k, v, cfg),
        (q, k, v),
        "out dq dk dv",
    )
    _, lse = reference.compressed_attention(q, k_cmp, v_cmp, cfg, *memories)
    indices = check_selection(case, q, k_cmp, lse)
    for name, tiles in (("selected, tiles", True), ("selected, blocks", False)):
        selected.prefers_tiles = lambda num_tokens, cfg, tiles=tiles: tiles
        attempt(
            name,
            lambda q, k, v: kernels.selected_attention(q, k, v, indices, cfg),
            lambda q, k, v: reference.selected_attention(q, k, v, indices, cfg),
            (q, k, v),
            "out dq dk dv",
        )
    lists.PARTIAL_BYTES = (2**20, 2**20)  # several chunks
    lists.ITEM_ROWS = 256  # several items a list
    attempt(
        "selected, gates",
        lambda q, k, v, g: kernels.selected_attention(q, k, v, indices, cfg, g),
        lambda q, k, v, g: reference.selected_attention(q, k, v, indices, cfg, g),
        (q, k, v, torch.ones(indices.shape, dtype=torch.float64, device=device)),
        "out dq dk dv dgates",
    )
    attempt(
        "importance at blocks",
        lambda q, k, e: kernels.selected_importance(q, k, e.float(), indices, cfg),
        lambda q, k, e: torch.where(
            indices < 0,
            0.0,
            reference.block_importance(q, k, e, cfg, not case.per_head).gather(
                -1, indices.clamp_min(0).long()
            ),
        ),
        (q, k_cmp, lse.float().double()),
        "value dq dk dlse",
    ) if T <= 1000 else None
    attempt(
        "combine",
        kernels.combine,
        reference.combine,
        (torch.rand_like(new(B, T, H, 3)), *(new(B, T, H, DV) for _ in range(3))),
        "out dgates da db dc",
    )


def check_selection(case: Case, q: Tensor, k_cmp: Tensor, lse: Tensor) -> Tensor:
    """Prints how the kernel's choice scores beside the reference's; returns indices with gaps."""
    cfg, shared = case.cfg, not case.per_head
    importance = reference.block_importance(q, k_cmp, lse, cfg, shared)
    want = reference.top_blocks(importance, cfg)
    try:
        arguments = (q.to(case.dtype), k_cmp.to(case.dtype), lse.float(), cfg, shared)
        got, again = kernels.select_blocks(*arguments), kernels.select_blocks(*arguments)
        counts = bool(((got >= 0).sum(-1) == (want >= 0).sum(-1)).all())
        gap = 0.0
        if want.numel():
            rank = blocks.priority(case.T, cfg, q.device)[:, None]
            score = torch.where(rank > 0, 1e3 * rank, importance.clamp_min(-1e3))

            def kept(index: Tensor) -> Tensor:
                value = score.gather(-1, index.clamp_min(0).long())
                return torch.where(index >= 0, value, 0.0).sum(-1)

            gap = (kept(want) - kept(got)).max().item()
        pushed = torch.where(got < 0, 2**30, got)
        steps = pushed.diff(dim=-1)
        ordered = bool(((steps > 0) | (pushed[..., 1:] == 2**30)).all())
        agree = (got == want).double().mean().item()
        fine = counts and ordered and gap <= 1e-2 and torch.equal(got, again)
        line = f"{'ok  ' if fine else 'FAIL'} agree {agree:.5f} lost score {gap:.1e}"
    except Exception as error:
        line = f"FAIL {type(error).__name__}: {str(error)[:300]}"
    print(f"  {'select':22s} {line}", flush=True)
    if case.T > 3:
        want = want.clone()
        want[:, 3] = -1  # a token that keeps nothing
    return want


def check_addresses() -> None:
    """More than 2**31 elements: the last tokens of a long window against the reference."""
    T, H, D, tail = 2**18 + 64, 64, 128, 256
    cfg = NSAConfig(sliding_window_size=64)
    q = torch.randn(1, T, H, D, device=DEVICE, dtype=BF16).requires_grad_()
    k, v = (torch.randn(1, T, 4, D, device=DEVICE, dtype=BF16) for _ in range(2))
    out = kernels.sliding_window_attention(q, k, v, cfg)
    (dq,) = torch.autograd.grad(out, q, torch.ones_like(out))
    q_end = q[:, -tail:].detach().requires_grad_()
    want = reference.sliding_window_attention(q_end, k[:, -tail:], v[:, -tail:], cfg)
    (dq_want,) = torch.autograd.grad(want, q_end, torch.ones_like(want))
    half = tail // 2  # the rest of the tail looks back beyond it
    for name, a, b in (("out", out, want), ("dq", dq, dq_want)):
        error = (a[:, -half:].float() - b[:, -half:].float()).abs().max().item()
        print(f"  {name:22s} {'ok  ' if error < 0.05 else 'FAIL'} error {error:.1e}", flush=True)


COMPILE_ONLY = False  # run once, for Triton's cache, while checks have the GPU anyway


# ---- times ------------------------------------------------------------


def milliseconds(run: Callable[[], object], seconds: float = 0.25) -> float:
    """Median of a few runs between CUDA events, after one that compiles and one that warms up."""
    run()
    if COMPILE_ONLY:
        return 0.0
    run()
    torch.cuda.synchronize()
    times: list[float] = []
    begin = time.time()
    while len(times) < 3 or (time.time() - begin < seconds and len(times) < 30):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(stop))
        if time.time() - begin > 4 * seconds:
            break
    return sorted(times)[len(times) // 2]


def both_ways(op: Callable[..., Tensor], *inputs: Tensor) -> tuple[float, float]:
    """Milliseconds forward (without a graph) and backward."""
    with torch.no_grad():
        forward = milliseconds(lambda: op(*inputs))
    leaves = [x.detach().requires_grad_() for x in inputs]
    out = op(*leaves)
    dout = torch.randn_like(out)
    backward = milliseconds(lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True))
    return forward, backward


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal cuDNN attention on [B, H, T, D]."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        )


def time_layout(B: int, H: int, G: int, D: int, lengths: Sequence[int], sizes: dict) -> None:
    cfg = NSAConfig(**sizes)
    for T in lengths:
        if COMPILE_ONLY and T > 8192:
            continue
        torch.manual_seed(0)
        q, k, v = (torch.randn(B, T, n, D, device=DEVICE, dtype=BF16) for n in (H, G, G))
        time_parts(q, k, v, cfg)
        time_whole(q, k, v, cfg)
        del q, k, v
        torch.cuda.empty_cache()


def row(T: int, name: str, measure: Callable[[], Sequence[float]], note: str = "") -> None:
    """Print one line of a table, whatever happens."""
    try:
        text = " ".join(f"{x:9.3f}" for x in measure())
    except Exception as error:
        text = f"FAIL {type(error).__name__}: {str(error)[:200]}"
    print(f"  T {T:6d} {name:18s} {text} {note}", flush=True)


def time_parts(q: Tensor, k: Tensor, v: Tensor, cfg: NSAConfig) -> None:
    T, prefers_tiles = q.shape[1], selected.prefers_tiles
    k_cmp, v_cmp = pooled(k, cfg), pooled(v, cfg)
    row(T, "dense cuDNN", lambda: both_ways(dense, *(x.transpose(1, 2) for x in (q, k, v))))
    row(
        T,
        "compressed",
        lambda: both_ways(
            lambda q, k, v: kernels.compressed_attention(q, k, v, cfg)[0], q, k_cmp, v_cmp
        ),
    )
    lse = kernels.compressed_attention(q, k_cmp, v_cmp, cfg)[1]
    row(T, "select", lambda: (milliseconds(lambda: kernels.select_blocks(q, k_cmp, lse, cfg)),))
    indices = kernels.select_blocks(q, k_cmp, lse, cfg)
    for tiles in (True, False):
        if tiles and T > 16384:
            continue
        selected.prefers_tiles = lambda num_tokens, cfg, tiles=tiles: tiles
        row(
            T,
            "selected " + ("tiles" if tiles else "blocks"),
            lambda: both_ways(
                lambda q, k, v: kernels.selected_attention(q, k, v, indices, cfg), q, k, v
            ),
            "<- table" if prefers_tiles(T, cfg) == tiles else "",
        )
    selected.prefers_tiles = prefers_tiles
    row(
        T,
        "window",
        lambda: both_ways(lambda q, k, v: kernels.sliding_window_attention(q, k, v, cfg), q, k, v),
    )
    row(T, "pool", lambda: both_ways(lambda k: pooled(k, cfg), k))
    gates = torch.rand(*q.shape[:3], 3, device=DEVICE, dtype=BF16)
    row(T, "combine", lambda: both_ways(kernels.combine, gates, q, q, q))


def time_whole(q: Tensor, k: Tensor, v: Tensor, cfg: NSAConfig) -> None:
    T = q.shape[1]
    gates = torch.rand(*q.shape[:3], 3, device=DEVICE, dtype=BF16)
    inputs = (gates, q, k, v, *(torch.randn_like(k) for _ in range(4)))
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    row(T, "whole NSA", lambda: both_ways(lambda *x: whole(*x, cfg=cfg), *inputs))
    peak = (torch.cuda.max_memory_allocated() - held) / 2**30
    print(f"  T {T:6d} whole NSA peak memory above inputs {peak:.2f} GiB", flush=True)


def pooled(x: Tensor, cfg: NSAConfig) -> Tensor:
    """Mean-pooled keys [B, C, G, D]."""
    return x.unfold(1, cfg.compress_block_size, cfg.compress_block_sliding_stride).mean(-1)


def whole(gates, q, k_slc, v_slc, k_win, v_win, k_raw, v_raw, *, cfg: NSAConfig) -> Tensor:
    """NSA from projected heads to the gated sum."""
    k_cmp, v_cmp = pooled(k_raw, cfg), pooled(v_raw, cfg)
    compressed, lse = kernels.compressed_attention(q, k_cmp, v_cmp, cfg)
    indices = kernels.select_blocks(q, k_cmp, lse, cfg)
    chosen = kernels.selected_attention(q, k_slc, v_slc, indices, cfg)
    sliding = kernels.sliding_window_attention(q, k_win, v_win, cfg)
    return kernels.combine(gates, compressed, chosen, sliding)


# ---- processes ------------------------------------------------------------


def run_alone(kind: str, name: str, stop: float) -> str:
    """One case or layout in a process of its own, until `stop`; what it printed, how it ended."""
    command = [sys.executable, "-u", "-m", "benchmarks.check_kernels", f"--{kind}-one", name]
    begin = time.time()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=os.environ
    )
    try:
        output, _ = process.communicate(timeout=max(1.0, stop - begin))
        end = "" if process.returncode == 0 else f"  FAIL exit status {process.returncode}\n"
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        end = f"  FAIL stopped after {time.time() - begin:.0f} s\n"
    lines = [line for line in output.splitlines() if line.startswith("  ")]
    if end:
        lines += ["  | " + line for line in output.splitlines()[-6:]]
    return f"{name}  [{time.time() - begin:.0f} s]\n" + "\n".join(lines) + f"\n{end}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("check", "time"))
    parser.add_argument("--case", default="", help="part of the name of cases and layouts")
    parser.add_argument("--minutes", type=float, default=7.0)
    parser.add_argument("--workers", type=int, default=12)
    parser.add_argument("--check-one", help=argparse.SUPPRESS)
    parser.add_argument("--time-one", help=argparse.SUPPRESS)
    parser.add_argument("--compile-one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.check_one:
        if args.check_one == "addresses":
            return check_addresses()
        return check_case(CHECKS[args.check_one])
    if args.compile_one:
        global COMPILE_ONLY
        COMPILE_ONLY = True
    if args.time_one or args.compile_one:
        return time_layout(*LAYOUTS[args.time_one or args.compile_one])
    stop = time.time() + 60 * args.minutes
    print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, flush=True)
    layouts = [name for name in LAYOUTS if args.case in name]
    if args.only != "time":
        share = 1.0 if args.only == "check" else 0.55
        check_all(args.case, layouts, args.workers, time.time() + share * 60 * args.minutes)
    if args.only != "check":
        print("milliseconds: forward, backward", flush=True)
        for place, name in enumerate(layouts):
            limit = max(20.0, (stop - time.time()) / (len(layouts) - place) * 1.5)
            print(run_alone("time", name, time.time() + limit), flush=True)


def check_all(part: str, layouts: Sequence[str], workers: int, stop: float) -> None:
    """The cases side by side; beside them, what is timed later is compiled."""
    names = [name for name in (*CHECKS, "addresses") if part in name]
    with ThreadPoolExecutor(workers) as pool:
        jobs = [pool.submit(run_alone, "compile", name, stop) for name in layouts]
        jobs += [pool.submit(run_alone, "check", name, stop) for name in names]
        for place in as_completed(jobs):
            if jobs.index(place) >= len(layouts) or "FAIL" in place.result():
                print(place.result(), flush=True)


if __name__ == "__main__":
    main()
