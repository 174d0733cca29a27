"""Time and measure attention: `make bench`, or `python -m benchmarks.attention --help`.

Suite `op`: NSA from projected heads to the gated sum and each of its ops, against dense attention
and other packages; forward, backward and peak memory by length and head layout, batch 1. What fails
its check against the float64 reference at a small length is not timed.
Suite `layer`: a whole layer at the sizes of `nsa_small`, by backend.

Every figure is a row of benchmarks/results.csv; docs/bench_*.png are drawn from the rows of this
run, all on one GPU. What is most telling is measured first, and what there is no time for is named.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch._functorch import config as functorch

from benchmarks import layer, measure, plots, workers
from benchmarks.rivals import RIVALS, backend_of
from benchmarks.workers import Assignment, Job, Row, Unavailable, attempt
from benchmarks.workloads import LAYOUTS, OURS, PAPER, Item, Layout, Workload
from nsa.backends import resolve_backend
from nsa.testing import Verdict, any_order

MODULE = "benchmarks.attention"
ITEMS = OURS | RIVALS
STAGES = (  # the most telling first
    ("nsa", "dense cudnn", "dense sdpa"),
    tuple(name for name in OURS if name != "nsa"),
    ("dense flash", "nsa fla", "selected fla", "selected lucidrains"),
    ("window flex", "dense flex"),
)
WARM_AT_MOST = 8192  # tokens: longer inputs compile nothing new, but for FlexAttention


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    suites = ["op", "layer"] if on_gpu else ["layer"]
    parser.add_argument("--suites", nargs="+", choices=("op", "layer"), default=suites)
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=[*LAYOUTS])
    parser.add_argument(
        "--tokens", type=int, nargs="+", default=[2**n * 1024 for n in range(8)], help="of suite op"
    )
    parser.add_argument("--items", nargs="+", default=[""], help="parts of the names of ops")
    parser.add_argument("--backend", default="auto", help="of our ops")
    parser.add_argument("--flex-tokens", type=int, nargs="*", default=[8192, 65536])
    parser.add_argument("--layer-tokens", type=int, nargs="+", default=[256, 512, 1024, 2048])
    parser.add_argument("--batch", type=int, default=1, help="of suite layer")
    parser.add_argument("--check-tokens", type=int, default=2064 if on_gpu else 144)
    parser.add_argument("--seconds", type=float, default=0.15, help="of repeating, each direction")
    parser.add_argument("--warm-seconds", type=float, default=120.0 if on_gpu else 0.0)
    parser.add_argument("--docs", type=Path, default=plots.DOCS, help="where the plots go")
    workers.common_options(parser, minutes=8.5)
    return parser.parse_args(argv)


def jobs_of(group: str, options: argparse.Namespace) -> list[Job]:
    """What a worker does, in order."""
    if group == "layer":
        return [(name, tokens) for tokens in options.layer_tokens for name in layer.LAYERS]
    return [
        (name, tokens)
        for stage in STAGES
        for tokens in (options.tokens if "window flex" not in stage else options.flex_tokens)
        for name in stage
        if any(part in name for part in options.items)
    ]


def dtype_on(device: torch.device) -> torch.dtype:
    return torch.bfloat16 if device.type == "cuda" else torch.float32


# ---- one worker, one head layout ------------------------------------------------------------


class Bench:
    """Times items of one head layout, each once its check holds."""

    def __init__(self, group: str, options: argparse.Namespace) -> None:
        self.layout, self.options = LAYOUTS[group], options
        self.device: torch.device = options.device
        self.dtype = dtype_on(self.device)
        self.backend = resolve_backend(options.backend)
        self.verdicts: dict[str, Verdict] = {}
        self.workload = self.new_workload(options.check_tokens)

    def new_workload(self, tokens: int) -> Workload:
        torch.manual_seed(tokens)
        return Workload(self.layout, tokens, self.dtype, self.device, self.backend)

    def item(self, name: str, tokens: int) -> Item:
        """Inputs are shared by the items of one length."""
        if self.workload.tokens != tokens:
            self.workload = self.new_workload(tokens)
        return ITEMS[name](self.workload)

    def verdict(self, name: str) -> Verdict:
        """All checks of an item at a small length, in the dtype it is timed in."""
        if name not in self.verdicts:
            item = self.item(name, self.options.check_tokens)
            self.verdicts[name] = summed_up(item)
            print(f"  {name:<20} check    {self.verdicts[name]}", flush=True)
        return self.verdicts[name]

    def measure(self, job: Job) -> Row:
        return columns(job, self.layout, self.dtype, self.backend) | attempt(
            lambda: self.judge_and_time(*job)
        )

    def judge_and_time(self, name: str, tokens: int) -> Row:
        verdict = self.verdict(name)
        if not verdict.ok:
            return {"status": f"refused: {verdict.text}"}
        item = self.item(name, tokens)
        with any_order(item.order):
            times = self.time(item)
        return times | {"check": f"{verdict.worst:.2f}" if item.checks else ""}

    def time(self, item: Item) -> dict[str, float]:
        seconds = self.options.seconds
        if item.differentiable:
            times = measure.forward_and_backward(item.op, item.inputs, self.device, seconds)
            return times | {"peak_mib": measure.step_memory(item.op, item.inputs, self.device)}

        def run() -> object:
            return item.op(*item.inputs)

        forward = measure.milliseconds(run, self.device, seconds=seconds)
        memory = measure.peak_mib(run, self.device)
        return {"forward_ms": forward, "step_ms": forward, "peak_mib": memory}

    def warm(self, job: Job) -> Row:
        """Compile what the measurement will need."""
        name, tokens = job
        if tokens > WARM_AT_MOST and "flex" not in name:
            raise Unavailable("compiled by then")

        def once() -> Row:
            self.verdict(name)
            item = self.item(name, tokens)
            with any_order(item.order):
                with torch.no_grad():
                    item.op(*item.inputs)
                if item.differentiable:
                    measure.step_memory(item.op, item.inputs, self.device)
            return {}

        return attempt(once)


def columns(job: Job, layout: Layout, dtype: torch.dtype, backend: str) -> dict:
    """What is known of a row before it is measured."""
    name, tokens = job
    return {
        "suite": "op",
        "op": name if name in OURS else name.split()[0],
        "backend": backend if name in OURS else backend_of(name),
        **layout.columns,
        "tokens": tokens,
        "batch": 1,
        "dtype": str(dtype).removeprefix("torch."),
        "sizes": measure.sizes_of(PAPER),
    }


def summed_up(item: Item) -> Verdict:
    """One verdict of all of an item's checks; one that raises is red."""
    try:
        found = [check() for check in item.checks]
    except Exception as error:
        return Verdict(False, f"{type(error).__name__}: {str(error)[:200]}", float("nan"))
    if not found:
        return Verdict(True, f"unchecked: {item.unchecked}", float("nan"))
    return Verdict(
        all(verdict.ok for verdict in found),
        "; ".join(verdict.text for verdict in found),
        max(verdict.worst for verdict in found),
    )


def work(options: argparse.Namespace, told: Assignment) -> None:
    # The backward pass of a compiled op is timed several times over one graph.
    functorch.donated_buffer = False
    context = measure.environment(
        options.device, date=told.date, command=told.command, commit=options.commit
    )
    jobs = jobs_of(told.group, options)
    if told.group == "layer":

        def run(job: Job) -> Row:
            return layer.measure_layer(job, options.batch, options.device, options.seconds)
    else:
        bench = Bench(told.group, options)
        run = bench.warm if told.warm else bench.measure
    workers.work(told, jobs, run, context, options.out)


# ---- all of them ------------------------------------------------------------


def main() -> None:
    options = parse()
    if options.worker:
        return work(options, options.worker)
    stop = time.time() + 60 * options.minutes
    groups = [*options.layouts] if "op" in options.suites else []
    if options.warm_seconds and groups:
        workers.warm_up(MODULE, groups, min(options.warm_seconds, 0.3 * 60 * options.minutes))
    weights = {name: 4000 + LAYOUTS[name].heads * LAYOUTS[name].dim_head for name in groups}
    if "layer" in options.suites:
        groups.append("layer")
        weights["layer"] = 1500

    def describe(group: str, job: Job) -> Row:
        if group == "layer":
            return layer.columns(job, options.batch, options.device)
        return columns(job, LAYOUTS[group], dtype_on(options.device), options.backend)

    jobs = {group: jobs_of(group, options) for group in groups}
    date = workers.run_groups(MODULE, options, jobs, weights, describe, stop)
    if "op" in options.suites:
        print(plots.report(measure.read(options.out), date, options.docs), flush=True)


if __name__ == "__main__":
    main()
