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
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import flex_attention

from benchmarks import measure
from nsa import blocks, kernels, reference
from nsa.config import NSAConfig
from nsa.step_graph import StepGraph
from nsa.transformer import Transformer

H, G, D = 64, 4, 128
CFG = NSAConfig()
SHAPES = (  # context, batch: the bar first
    (65536, 32), (65536, 1), (131072, 8), (131072, 1), (65536, 8), (32768, 32), (32768, 8),
    (32768, 1), (16384, 32), (16384, 1), (8192, 32), (8192, 8), (8192, 1), (4096, 32), (4096, 1),
)  # fmt: skip
BARS = {(65536, 32): 6.0, (65536, 1): 2.0, (131072, 8): 7.0}
DEVICE = torch.device("cuda")
DTYPE = torch.bfloat16
SDPA = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def new(*shape: int) -> Tensor:
    return torch.randn(*shape, device=DEVICE, dtype=DTYPE)


class Step:
    """One decoding step of an NSA layer, from its projected heads."""

    def __init__(self, context: int, batch: int) -> None:
        C = blocks.num_compress_blocks(context, CFG) + 1
        self.q, self.gates = new(batch, 1, H, D), new(batch, 1, H, 3).sigmoid()
        self.new = [new(batch, 1, G, D) for _ in range(6)]
        rows = dict(
            compressed=C, selected=context, window=CFG.sliding_window_size,
            tail=CFG.compress_block_size,
        )  # fmt: skip
        self.parts = {
            name: (new(batch, size, G, D), new(batch, size, G, D)) for name, size in rows.items()
        }
        self.frequencies = torch.rand(D // 2, device=DEVICE)
        self.lengths = torch.full((batch,), context - 1, device=DEVICE)

    def append(self) -> Tensor:
        """The token enters the cache; φ is the mean, without learned positions."""
        mean = None, None, None
        return kernels.append_token(
            self.q, self.new, self.frequencies, self.lengths, self.parts, CFG, [mean, mean]
        )[0]

    def attend(self, q_rot: Tensor) -> tuple[Tensor, Tensor]:
        keys = (self.parts[name] for name in ("compressed", "selected", "window"))
        return kernels.cached_attention(
            self.q, q_rot, self.gates, *keys, self.lengths[:, None], cfg=CFG
        )  # fmt: skip

    def __call__(self) -> Tensor:
        return self.attend(self.append())[0]

    @staticmethod
    def floor_bytes(context: int, batch: int) -> int:
        """The keys and values that a step has to read: n*l' + T/d + w of each key head."""
        selected = CFG.num_selected_blocks * CFG.selection_block_size
        keys = selected + context // CFG.compress_block_sliding_stride + CFG.sliding_window_size
        return batch * keys * G * 2 * D * DTYPE.itemsize

    @staticmethod
    def read_bytes(context: int, batch: int) -> int:
        """With the scores, written and read once in float32."""
        scores = batch * H * (context // CFG.compress_block_sliding_stride) * 4
        return Step.floor_bytes(context, batch) + 2 * scores


def check() -> None:
    """The kernels against float64 at 8,192 tokens; raises AssertionError if they err too much."""
    step = Step(8192, 2)
    step.lengths[0] = 5001
    q_rot = step.append()
    out, indices = step.attend(q_rot)
    positions = step.lengths[:, None]

    def want(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        q, rot, gates = (x.to(dtype) for x in (step.q, q_rot, step.gates))
        C = blocks.num_compress_blocks(8192, CFG)
        k_cmp, v_cmp = (x[:, :C].to(dtype) for x in step.parts["compressed"])
        cmp, lse = reference.compressed_attention(
            q, k_cmp, v_cmp, CFG, positions=positions, num_tokens=8192
        )
        chosen = reference.select_blocks(q, k_cmp, lse, CFG, positions=positions, num_tokens=8192)
        k_slc, v_slc = (x.to(dtype) for x in step.parts["selected"])
        k_win, v_win = (x.to(dtype) for x in step.parts["window"])
        slc = reference.selected_attention(rot, k_slc, v_slc, indices, CFG, positions=positions)
        slots = blocks.ring_positions(step.lengths + 1, CFG.sliding_window_size)
        win = reference.sliding_window_attention(
            rot, k_win, v_win, CFG, positions=positions, key_positions=slots
        )
        return reference.combine(gates, cmp, slc, win), chosen

    (exact, chosen), (eager, _) = want(torch.float64), want(DTYPE)
    same = (chosen == indices).float().mean().item()
    error, budget = ((x.double() - exact).abs().max().item() for x in (out, eager))
    budget = 2 * budget + torch.finfo(DTYPE).eps * exact.abs().max().item()
    print(f"check: error {error:.2e}, budget {budget:.2e}; {same:.1%} of the blocks are equal")
    assert error <= budget and same > 0.99, "the kernels err: nothing is timed"


def dense_steps(context: int, batch: int) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Dense decoding: the newest key and value enter the cache, then attention, by kernel."""
    q, k, v = new(batch, H, 1, D), new(batch, G, context, D), new(batch, G, context, D)
    last, new_k, new_v = context - 1, new(batch, G, D), new(batch, G, D)
    for name, kernel in SDPA.items():

        def step(kernel: SDPBackend = kernel, *, repeat: bool = name == "efficient") -> Tensor:
            k[:, :, last], v[:, :, last] = new_k, new_v
            with sdpa_kernel(kernel):
                if repeat:  # it has no grouped heads: queries of a head become its rows
                    rows = q.view(batch, G, H // G, D)
                    return F.scaled_dot_product_attention(rows, k, v)
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

        def rows_step(kernel: SDPBackend = kernel) -> Tensor:
            k[:, :, last], v[:, :, last] = new_k, new_v
            with sdpa_kernel(kernel):
                return F.scaled_dot_product_attention(q.view(batch, G, H // G, D), k, v)

        yield name, step
        if name in ("cudnn", "flash"):  # the same product with a group's heads as rows
            yield f"{name} rows", rows_step
    compiled = torch.compile(flex_attention, dynamic=False)

    def flex() -> Tensor:
        k[:, :, last], v[:, :, last] = new_k, new_v
        return compiled(q, k, v, enable_gqa=True)

    if (context, batch) in BARS:  # it compiles anew for every shape
        yield "flex", flex


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
