"""What each kernel of the whole op takes on this GPU: `python -m benchmarks.probes.kernel_times`.

    python -m benchmarks.probes.kernel_times --heads 64/4 --tokens 65536 8192

As PyTorch's profiler sees them, forward and backward apart, kernels of one name together. Unlike
`benchmarks.attention` it counts no time between kernels, and checks nothing.
"""

import argparse
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks.workloads import LAYOUTS, OURS, PAPER, Layout, Workload

CALLS = 3
SHOWN = 0.005  # of the total: what takes less is in the total alone


def kernel_milliseconds(run: Callable[[], object]) -> dict[str, tuple[float, float]]:
    """Of a call, by kernel: how many launches, and their milliseconds; the longest first."""
    for _ in range(2):
        run()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(CALLS):
            run()
        torch.cuda.synchronize()
    return by_name(trace.events() or [])


def by_name(events: Iterable[Any]) -> dict[str, tuple[float, float]]:
    launches: Counter[str] = Counter()
    times: defaultdict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type.name == "CUDA" and not event.is_user_annotation:
            launches[event.name] += 1
            times[event.name] += event.time_range.elapsed_us() / 1e3
    longest_first = sorted(times, key=lambda name: -times[name])
    return {name: (launches[name] / CALLS, times[name] / CALLS) for name in longest_first}


def show(title: str, kernels: dict[str, tuple[float, float]]) -> str:
    total = sum(time for _, time in kernels.values())
    lines = [f"{title}: {total:.2f} ms"]
    for name, (launches, time) in kernels.items():
        if time >= SHOWN * total:
            lines.append(f"  {time:8.2f} ms  {launches:4.0f} x  {name[:60]}")
    return "\n".join(lines)


def measure_layout(layout: Layout, tokens: int) -> None:
    torch.manual_seed(tokens)
    device = torch.device("cuda")
    item = OURS["nsa"](Workload(layout, tokens, torch.bfloat16, device, "triton"))
    leaves = [x.detach().requires_grad_() for x in item.inputs]
    with torch.no_grad():
        forward = kernel_milliseconds(lambda: item.op(*leaves))
    out = item.op(*leaves)
    dout = torch.randn_like(out)
    backward = kernel_milliseconds(
        lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)
    )
    for name, kernels in (("forward", forward), ("backward", backward)):
        print(show(f"{layout.name}, {tokens} tokens, {name}", kernels), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", nargs="+", choices=LAYOUTS, default=[*LAYOUTS])
    parser.add_argument("--tokens", type=int, nargs="+", default=[65536])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU here: benchmarks.probes.compile_kernels needs none")
    where = measure.environment(torch.device("cuda"), date=measure.now(), command="")
    print(where["device"], where["torch"], where["triton"], measure.sizes_of(PAPER), flush=True)
    for name in options.heads:
        for tokens in options.tokens:
            measure_layout(LAYOUTS[name], tokens)


if __name__ == "__main__":
    main()
