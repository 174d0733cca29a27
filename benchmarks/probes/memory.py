"""The peak memory of the whole op, forward and backward, predicted without a GPU.

    python -m benchmarks.probes.memory --heads 64/4 --tokens 65536

Launchers run on CPU tensors of a sixteenth of the tokens and launch nothing; the bound on partial
results is a sixteenth too, so every allocation is a sixteenth of what it would be. PyTorch's
profiler sees them all. Counted are outputs and the gradient that comes back for them, but not the
inputs, as in `benchmarks.attention`. Left out: what CUDA's sort takes, and rounding up to whole
blocks by the allocator.
"""

import argparse
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.probes.host_overhead import no_gpu
from benchmarks.workloads import LAYOUTS, Layout, Workload, nsa
from nsa.kernels.block_order import inverted_lists
from nsa.testing import loop_order

SCALE = 16


class Allocation(NamedTuple):
    """One allocation; with a negative number of bytes, one that is freed."""

    time: int
    address: int
    size: int
    op: str  # the outermost op of ours, or else of PyTorch


def allocations(layout: Layout, tokens: int) -> list[Allocation]:
    """Of a second step, in order."""
    w = Workload(layout, tokens, torch.bfloat16, torch.device("cpu"), "triton")
    leaves = [x.requires_grad_() for x in (w.gates, w.q, w.q_rot, *w.keys_and_values)]

    def step() -> None:
        out = nsa(w, w.backend, leaves)
        torch.autograd.grad(out, leaves, torch.empty_like(out))

    scaled = tuple(size // SCALE for size in inverted_lists.PARTIAL_BYTES)
    with no_gpu(), loop_order(False), patch.object(inverted_lists, "PARTIAL_BYTES", scaled):
        step()
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
            step()
    assert trace.profiler is not None and trace.profiler.kineto_results is not None
    tree = trace.profiler.kineto_results.experimental_event_tree()
    return sorted(found(tree, ""))


def found(nodes: list, op: str) -> Iterator[Allocation]:
    for node in nodes:
        if node.tag.name == "Allocation":
            fields = node.extra_fields
            yield Allocation(node.start_time_ns, fields.ptr, fields.alloc_size, op)
        else:
            named = node.name if node.name.startswith(("nsa::", "aten::")) else ""
            yield from found(node.children, op or named)


def peak(events: list[Allocation]) -> tuple[int, Counter[str]]:
    """The most bytes held at once, and by what."""
    live: dict[int, Allocation] = {}
    held = most = 0
    holders: Counter[str] = Counter()
    for event in events:
        if event.size > 0:
            live[event.address] = event
        else:
            live.pop(event.address, None)
        held += event.size
        if held > most:
            most, holders = held, Counter()
            for each in live.values():
                holders[each.op] += each.size
    return most, holders


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", nargs="+", choices=LAYOUTS, default=[*LAYOUTS])
    parser.add_argument("--tokens", type=int, default=65536)
    args = parser.parse_args()
    for name in args.heads:
        most, holders = peak(allocations(LAYOUTS[name], args.tokens // SCALE))
        print(f"{LAYOUTS[name].name}: {most * SCALE / 2**30:.2f} GiB at the peak, held by")
        for op, size in holders.most_common():
            print(f"  {size * SCALE / 2**20:8.0f} MiB  {op}")


if __name__ == "__main__":
    main()
