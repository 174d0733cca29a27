"""Time decoding: `python -m benchmarks.decode --minutes 4` (needs a GPU).

One layer's attention step at the paper's sizes, from projected heads and a full cache to the gated
sum, with its append; against dense attention on a cache of the same length by every decode that
torch has. With and without CUDA graphs. Then prefill, and a whole step of `nsa_small`.

First the kernels are checked on this GPU: no figure without it. Rows go to benchmarks/results.csv
(suite `decode`): `tokens` is the context, forward_ms the time of one step of all sequences, and
tokens_per_second counts all sequences. The table gives GB/s of keys, values and scores read.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.decode_steps import (
    BARS,
    CFG,
    DEVICE,
    DTYPE,
    SHAPES,
    D,
    G,
    H,
    Step,
    check,
    dense_steps,
)
from nsa.step_graph import StepGraph
from nsa.transformer import Transformer


def captured(run: Callable[[], Tensor]) -> Callable[[], object]:
    """The same as a CUDA graph."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def timed(run: Callable[[], Tensor]) -> tuple[str, float, float]:
    """How it went, and milliseconds as called and as a graph."""
    try:
        with torch.no_grad():
            called = measure.milliseconds(run, DEVICE, seconds=0.06)
            graph = measure.milliseconds(captured(run), DEVICE, seconds=0.06)
        return "ok", called, graph
    except Exception as error:
        torch.cuda.synchronize()
        kind = "oom" if isinstance(error, torch.cuda.OutOfMemoryError) else "failed"
        first = (str(error).splitlines() or [""])[0]
        return f"{kind}: {type(error).__name__} {first[:80]}", float("nan"), float("nan")


def small_model() -> Transformer:
    """`nsa_small` in bfloat16, its weights drawn at random."""
    attention = dict(
        sliding_window_size=64, compress_block_size=8, compress_block_sliding_stride=4,
        selection_block_size=16, num_selected_blocks=8, num_initial_blocks=1, num_local_blocks=2,
        importance="probability_sum", compress_network="attention_pool",
        compress_mlp_expand_factor=1.0, num_compressed_mem_kv=0, use_diff_topk=False,
        query_heads_share_selected_kv=True, kv_per_branch=True, compressed_output=True,
        gate_bias=0.0, backend="triton",
    )  # fmt: skip
    model = Transformer(
        256, 512, 8, 8, 64, kv_heads=2, seq_len=1024, attention=attention, layer_pattern=["nsa"]
    )
    return model.to(DEVICE, DTYPE).eval()


@torch.no_grad()
def small_model_rows() -> list[dict]:
    """Tokens a second of `nsa_small`, greedy, batch 1: as called and as one graph a step."""
    model, rows = small_model(), []
    prompt = torch.randint(256, (1, 512), device=DEVICE)
    for name in ("called", "graph"):
        cache = model.empty_cache(1, 1024)
        ids = model(prompt, cache=cache, only_last=True).argmax(-1)
        step = StepGraph(model, cache) if name == "graph" else None
        count = 300 if step else 60

        def run(ids: Tensor, step=step, cache=cache) -> Tensor:
            logits = step(ids) if step else model(ids, cache=cache, only_last=True)
            return logits.argmax(-1)

        for _ in range(5):
            ids = run(ids)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(count):
            ids = run(ids)
        torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) / count
        rows.append(row("nsa_small", name, 1024, 1, "ok", 1e3 * seconds, (8, 2, 64)))
    return rows


def row(
    op: str,
    backend: str,
    context: int,
    batch: int,
    status: str,
    ms: float,
    heads: tuple[int, int, int] = (H, G, D),
) -> dict:
    names = ("heads", "kv_heads", "dim_head")
    return {
        "suite": "decode", "op": op, "backend": backend, **dict(zip(names, heads, strict=True)),
        "tokens": context, "batch": batch, "dtype": "bfloat16", "sizes": measure.sizes_of(CFG),
        "status": status, "forward_ms": ms, "tokens_per_second": 1e3 * batch / ms,
    }  # fmt: skip


def measure_shape(context: int, batch: int) -> list[dict]:
    """Rows of one context and batch."""
    rows = []
    step = Step(context, batch)
    q_rot = step.append()
    for name, run in (("nsa", step), ("nsa attention", lambda: step.attend(q_rot)[0])):
        status, called, graph = timed(run)
        rows += [row(name, "triton", context, batch, status, called)]
        rows += [row(name, "triton graph", context, batch, status, graph)]
    for name, run in dense_steps(context, batch):
        status, called, graph = timed(run)
        rows += [row("dense", name, context, batch, status, called)]
        rows += [row("dense", f"{name} graph", context, batch, status, graph)]
    torch.cuda.empty_cache()
    return rows


@torch.no_grad()
def prefill_rows() -> list[dict]:
    """The parallel forward pass that fills a cache: `nsa_small`, one prompt of its length."""
    model = small_model()
    prompt = torch.randint(256, (1, 1024), device=DEVICE)

    def run() -> Tensor:
        return model(prompt, cache=model.empty_cache(1, 1024), only_last=True)

    return [
        row("prefill", "nsa_small", 1024, 1, "ok", measure.milliseconds(run, DEVICE), (8, 2, 64))
    ]


def summary(rows: list[dict]) -> str:
    """A line a shape: ours, the fastest dense decode, the ratio, and the memory's speed."""
    lines = [
        f"{'context':>8}{'batch':>6}{'nsa ms':>9}{'dense ms':>10}  by{'':14}{'ratio':>6}{'GB/s':>7}"
    ]
    shapes = {(r["tokens"], r["batch"]) for r in rows if r["op"] == "nsa"}
    for context, batch in sorted(shapes):
        here = [r for r in rows if (r["tokens"], r["batch"]) == (context, batch)]
        ok = [r for r in here if r["status"] == "ok" and r["forward_ms"] == r["forward_ms"]]
        ours = min((r["forward_ms"] for r in ok if r["op"] == "nsa"), default=float("nan"))
        dense = min(
            (r for r in ok if r["op"] == "dense"), key=lambda r: r["forward_ms"], default=None
        )
        if dense is None:
            continue
        ratio, speed = dense["forward_ms"] / ours, Step.read_bytes(context, batch) / ours / 1e6
        bar = BARS.get((context, batch))
        verdict = "" if bar is None else f"  bar {bar:g}: {'met' if ratio >= bar else 'MISSED'}"
        lines.append(
            f"{context:>8}{batch:>6}{ours:>9.4f}{dense['forward_ms']:>10.4f}  "
            f"{dense['backend']:<16}{ratio:>6.2f}{speed:>7.0f}{verdict}"
        )
    share = Step.read_bytes(65536, 32) / Step.floor_bytes(65536, 32)
    lines.append(f"bytes read over the floor at 65536, batch 32: {share:.2f}")
    for r in rows:
        if r["op"] in ("nsa_small", "prefill"):
            lines.append(
                f"{r['op']} {r['backend']}: {r['forward_ms']:.3f} ms, "
                f"{r['tokens_per_second']:.0f} steps/s"
            )
    return "\n".join(lines)


def draw(rows: list[dict], path: Path) -> None:
    """Milliseconds a token by context, ours and the fastest dense decode, one panel a batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, ScalarFormatter

    batches = sorted({r["batch"] for r in rows if r["op"] == "nsa"})
    figure, axes = plt.subplots(1, len(batches), figsize=(4 * len(batches), 3.2), squeeze=False)
    for axis, batch in zip(axes[0], batches, strict=True):
        for op, label in (("nsa", "NSA"), ("dense", "dense, fastest of torch")):
            best: dict[int, float] = {}
            for r in rows:
                if (r["op"], r["batch"], r["status"]) == (op, batch, "ok"):
                    best[r["tokens"]] = min(best.get(r["tokens"], float("inf")), r["forward_ms"])
            contexts = sorted(best)
            axis.loglog(contexts, [best[c] for c in contexts], "o-", label=label)
        shown = sorted({r["tokens"] for r in rows if r["op"] == "nsa" and r["batch"] == batch})
        axis.set_xticks(shown, [f"{tokens // 1024}k" for tokens in shown], minor=False)
        axis.set_xticks([], minor=True)
        for ticks in (axis.yaxis.set_major_formatter, axis.yaxis.set_minor_formatter):
            ticks(ScalarFormatter())
        axis.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
        axis.set(title=f"batch {batch}", xlabel="context, tokens", ylabel="ms a step")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.suptitle(f"One attention layer's decoding step, {H}/{G} heads of {D}, bfloat16")
    figure.tight_layout()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4.0, help="begin nothing new after these")
    parser.add_argument("--out", type=Path, default=measure.RESULTS)
    parser.add_argument("--picture", type=Path, default=Path("docs/bench_decode.png"))
    parser.add_argument("--commit", help="of a copy without history")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.decode needs a CUDA GPU")
    stop = time.time() + 60 * options.minutes - 20
    command = f"python -m benchmarks.decode --minutes {options.minutes:g}"
    context = measure.environment(
        DEVICE, date=measure.now(), command=command, commit=options.commit
    )
    check()
    rows: list[dict] = []
    jobs: list[Callable[[], list[dict]]] = [
        *(lambda s=s: measure_shape(*s) for s in SHAPES[:3]), small_model_rows, prefill_rows,
        *(lambda s=s: measure_shape(*s) for s in SHAPES[3:]),
    ]  # fmt: skip
    for number, job in enumerate(jobs):
        if time.time() > stop:
            print(f"no time for {len(jobs) - number} of {len(jobs)} measurements")
            break
        found = job()
        measure.append(options.out, *(r | context for r in found))
        rows += found
        for r in found:
            print(
                f"{r['op']:<14}{r['backend']:<18}{r['tokens']:>7}{r['batch']:>4} "
                f"{r['forward_ms']:.4f} ms {r['status']}",
                flush=True,
            )
    draw(rows, options.picture)
    print(summary(rows), flush=True)


if __name__ == "__main__":
    main()
