"""What each launch of a decoding step takes on this GPU: `python -m benchmarks.probes.decode_step`.

Replays a step as one CUDA graph under PyTorch's profiler, the L2 cache flushed before each replay:
microseconds of every kernel in the order of launches, of the gap before it, and for our own kernels
the bytes that it has to move. First the attention step of one layer at the shapes of the bars, also
with its keys cut otherwise, then a whole step of `nsa_small`.
"""

import argparse
import statistics
from collections import defaultdict
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import measure
from benchmarks.decode import captured, small_model
from benchmarks.decode_steps import BARS, CFG, DEVICE, DTYPE, D, G, H, Step
from nsa.kernels import decode
from nsa.step_graph import StepGraph

CALLS = 20
CUTS = [
    (decode.MOST_SPLITS, decode.RESIDENT),
    (16, 2),
    (32, 2),
    (64, 1),
    (64, 3),
    (64, 4),
    (128, 4),
]
SHOWN_NAME = 56


class Launch(NamedTuple):
    """A kernel of a step: its microseconds, and those between the one before and it."""

    name: str
    time: float
    gap: float


def launches(replay: Callable[[], object]) -> list[Launch]:
    """The kernels of a replay in order, medians over several."""
    flush = measure.larger_than_cache(torch.cuda.current_device())
    replay()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        for _ in range(CALLS):
            flush.zero_()
            replay()
        torch.cuda.synchronize()
    events = sorted(
        (e.time_range.start, e.time_range.end, e.name)
        for e in trace.events() or []
        if e.device_type.name == "CUDA" and not e.is_user_annotation
    )
    size, rest = divmod(len(events), CALLS)
    assert not rest, f"{len(events)} kernels are no multiple of {CALLS} replays"
    replays = [events[i * size : (i + 1) * size] for i in range(CALLS)]
    found = []
    for i in range(1, size):  # the first is the flush
        time = statistics.median(r[i][1] - r[i][0] for r in replays)
        gap = statistics.median(r[i][0] - r[i - 1][1] for r in replays)
        found.append(Launch(replays[0][i][2], time, gap if i > 1 else 0.0))
    return found


def replay_microseconds(replay: Callable[[], object]) -> float:
    """Of a whole replay between events, the cache flushed, nothing profiled."""
    return 1e3 * measure.milliseconds(replay, DEVICE, seconds=0.1)


def bytes_moved(context: int, batch: int) -> dict[str, int]:
    """What our kernels have to read and write, by a part of their names."""
    row = batch * G * 2 * D * DTYPE.itemsize  # a key and a value of each key head
    blocks = context // CFG.compress_block_sliding_stride
    tokens = CFG.num_selected_blocks * CFG.selection_block_size + CFG.sliding_window_size
    scores = batch * H * blocks * 4
    return {
        "attend_compressed": blocks * row + scores,
        "rank_blocks": scores,
        "attend_tokens": tokens * row,
        "append_kernel": (CFG.compress_block_size + 6) * row,
    }


def table(found: list[Launch], moved: dict[str, int]) -> str:
    """A line a launch."""
    lines = [f"{'us':>8}{'gap us':>8}{'MB':>8}{'GB/s':>7}  kernel"]
    for launch in found:
        size = next((b for name, b in moved.items() if launch.name.startswith(name)), None)
        speed = "" if size is None else f"{size / launch.time / 1e3:7.0f}"
        size_mb = "" if size is None else f"{size / 1e6:8.2f}"
        lines.append(
            f"{launch.time:8.2f}{launch.gap:8.2f}{size_mb:>8}{speed:>7}  {launch.name[:SHOWN_NAME]}"
        )
    return "\n".join(lines)


def by_name(found: list[Launch]) -> str:
    """Launches of one name together, the longest first."""
    groups = defaultdict(list)
    for launch in found:
        groups[launch.name].append(launch)
    lines = [f"{'us':>8}{'gaps us':>9}{'count':>7}  kernel"]
    for name, group in sorted(groups.items(), key=lambda item: -sum(x.time for x in item[1])):
        time, gaps = sum(x.time for x in group), sum(x.gap for x in group)
        lines.append(f"{time:8.2f}{gaps:9.2f}{len(group):7d}  {name[:SHOWN_NAME]}")
    return "\n".join(lines)


def show(title: str, found: list[Launch], replay: Callable[[], object], lines: str) -> None:
    kernels, gaps = sum(x.time for x in found), sum(x.gap for x in found)
    print(
        f"\n{title}: {replay_microseconds(replay):.1f} us a replay; profiled, {len(found)} kernels "
        f"take {kernels:.1f} us and the gaps between them {gaps:.1f} us"
    )
    print(lines, flush=True)


@torch.no_grad()
def measure_attention(context: int, batch: int) -> None:
    step = Step(context, batch)
    replay = captured(step)
    found = launches(replay)
    floor = Step.floor_bytes(context, batch)
    title = f"attention step, {context} tokens x {batch}, floor {floor / 1e6:.1f} MB"
    show(title, found, replay, table(found, bytes_moved(context, batch)))


@torch.no_grad()
def measure_cuts(context: int, batch: int) -> None:
    """The same step with its keys cut into fewer and more parts."""
    for most, resident in CUTS:
        decode.MOST_SPLITS, decode.RESIDENT = most, resident
        step = Step(context, batch)
        time = replay_microseconds(captured(step))
        print(f"  at most {most:3d} parts, {resident} programs a multiprocessor: {time:.1f} us")
    decode.MOST_SPLITS, decode.RESIDENT = CUTS[0]


@torch.no_grad()
def measure_model() -> None:
    model = small_model()
    cache = model.empty_cache(1, 1024)
    ids = model(torch.randint(256, (1, 512), device=DEVICE), cache=cache, only_last=True).argmax(-1)
    step = StepGraph(model, cache)
    step(ids)
    assert step.graph is not None
    found = launches(step.graph.replay)
    show("nsa_small, a whole step at batch 1", found, step.graph.replay, by_name(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--context", type=int, help="with --batch, instead of the bars' shapes")
    parser.add_argument("--batch", type=int, default=1)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no GPU here: benchmarks.probes.compile_kernels needs none")
    where = measure.environment(DEVICE, date=measure.now(), command="")
    print(where["device"], where["torch"], where["triton"], where["commit"], flush=True)
    shapes = [(options.context, options.batch)] if options.context else [*BARS]
    for context, batch in shapes:
        measure_attention(context, batch)
        measure_cuts(context, batch)
    measure_model()


if __name__ == "__main__":
    main()
