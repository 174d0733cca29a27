"""What the host spends on one layer of sparse attention: time, ops and launches, without a GPU.

    python -m benchmarks.probes.host_overhead

Where sequences are short, a GPU waits for the host. Here kernels are bound to their arguments, as
for a launch on an H100, and then not run; all else runs on the CPU. Ops are counted at the sizes of
`nsa_small` under autocast, as it trains. Time is taken at widths so narrow that arithmetic costs
next to nothing, in float32, since the CPU's own bfloat16 products have overheads of their own: the
host does the same for any width. Left out is what needs a GPU: its driver, its memory allocator.
"""

import argparse
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from time import process_time
from typing import NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.layer import HEADS, KV_HEADS, SIZES
from nsa.attention import SparseAttention
from nsa.compress_networks import build_compress_network
from nsa.kernels import descriptors
from nsa.kernels.tile_order import op as tile_order

KERNEL = type(tile_order.attend_fwd_kernel)  # compiled for a GPU, or interpreted
LAUNCH = "launch "  # before a kernel's name in a profile
# Dispatched, but nothing to launch: views, allocations, and ops that only call others.
LAUNCHES_NOTHING = re.compile(
    r"(alias|as_strided|chunk|detach|expand|flatten|narrow|permute|_?reshape(_alias)?|resize_|select"
    r"|resolve_conj|slice|split|squeeze|t|transpose|unbind|unflatten|unfold|unsqueeze|view"
    r"|_unsafe_view|empty(_like|_strided)?|result_type|promote_types|_?to(_copy)?|type_as|clone"
    r"|contiguous|zeros(_like)?|ones(_like)?|pad|linear|matmul|einsum|rms_norm|softmax"
    r"|(select|slice)_backward)"
)


class Sizes(NamedTuple):
    """Of one layer and its input, a batch of one."""

    dim: int
    dim_head: int
    tokens: int


NSA_SMALL = Sizes(dim=512, dim_head=64, tokens=1024)
NARROW = Sizes(dim=32, dim_head=16, tokens=16)


class Counts(NamedTuple):
    """What one pass asks the host to do."""

    launches: int  # of Triton kernels
    custom_ops: int
    torch_kernels: int  # outermost aten ops that compute or copy: on a GPU a launch each, or more
    torch_calls: int  # all aten ops that went through the dispatcher, views and nested ones too


class H100:
    """As much of a GPU as binding a kernel's arguments asks about."""

    number = -1  # no real device: what is "compiled" for it is never launched on one

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


class Unlaunched:
    """A compiled kernel that does nothing."""

    function = packed_metadata = None

    def launch_metadata(self, *args: object) -> None: ...

    def run(self, *args: object) -> None: ...


def compile_nothing(kernel: JITFunction, key: str, *rest: object) -> Unlaunched:
    compiled = kernel.device_caches[H100.number][0]
    compiled[key] = Unlaunched()
    return compiled[key]


@contextmanager
def no_gpu() -> Iterator[None]:
    """Launchers take CPU tensors, and every step of a launch is taken but the last."""
    with ExitStack() as stack:
        stack.enter_context(patch.dict(os.environ, TRITON_INTERPRET="1"))  # `ops` lets a CPU pass
        stack.enter_context(patch.object(tile_order, "num_multiprocessors", lambda device: 132))
        stack.enter_context(patch.object(descriptors, "capability", lambda device: 90))
        if KERNEL is JITFunction:
            driver.set_active(H100())
            if torch.cuda.is_available():  # elsewhere there is none to go back to
                stack.callback(driver.reset_active)
            stack.enter_context(patch.object(JITFunction, "_do_compile", compile_nothing))
        else:
            stack.enter_context(patch.object(KERNEL, "run", lambda self, *args, **kwargs: None))
        yield


@contextmanager
def launches_in_profile() -> Iterator[None]:
    """Every launch is a range of its own in a profile."""
    launch = KERNEL.run

    def run(kernel, *args, **kwargs):
        with record_function(LAUNCH + kernel.__name__):
            return launch(kernel, *args, **kwargs)

    with patch.object(KERNEL, "run", run):
        yield


class Layer:
    """One layer as `nsa_small` has it, and its two passes."""

    def __init__(self, sizes: Sizes, *, autocast: bool) -> None:
        phi = build_compress_network(
            "attention_pool",
            dim_head=sizes.dim_head,
            kv_heads=KV_HEADS,
            compress_block_size=SIZES["compress_block_size"],
        )
        self.attention = SparseAttention(
            sizes.dim, sizes.dim_head, HEADS, **SIZES, kv_heads=KV_HEADS, compress_mlp=phi,
            backend="triton",
        )  # fmt: skip
        self.tokens = torch.randn(1, sizes.tokens, sizes.dim, requires_grad=True)
        self.leaves = [self.tokens, *self.attention.parameters()]
        self.autocast = autocast

    def forward(self) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            return self.attention(self.tokens)

    def backward(self, out: Tensor) -> None:
        torch.autograd.grad(out, self.leaves, torch.ones_like(out))

    def step(self) -> None:
        self.backward(self.forward())


# ---- counts ------------------------------------------------------------


def counted(sizes: Sizes, *, autocast: bool) -> tuple[list, list]:
    """The profiled events of a forward and of a backward pass."""
    with no_gpu(), launches_in_profile():
        layer = Layer(sizes, autocast=autocast)
        layer.step()  # what happens once happens here
        with profile(activities=[ProfilerActivity.CPU]) as forward:
            out = layer.forward()
        with profile(activities=[ProfilerActivity.CPU]) as backward:
            layer.backward(out)
    return list(forward.events() or []), list(backward.events() or [])


def counts(events: list) -> Counts:
    return Counts(
        launches=sum(event.name.startswith(LAUNCH) for event in events),
        custom_ops=sum(event.name.startswith("nsa::") for event in events),
        torch_kernels=sum(computes(event) and not within_one(event) for event in events),
        torch_calls=sum(event.name.startswith("aten::") for event in events),
    )


def computes(event) -> bool:
    name = event.name.removeprefix("aten::")
    return name != event.name and not LAUNCHES_NOTHING.fullmatch(name)


def within_one(event) -> bool:
    """Whether an op that computes called this one: the CPU's way to do what a GPU does at once."""
    parent = event.cpu_parent
    return parent is not None and (computes(parent) or within_one(parent))


def contributors(passes: tuple[list, list], rows: int) -> list[str]:
    """The names with most time of their own, and how often each pass has them."""
    own = Counter[str]()
    for events in passes:
        for event in events:
            own[event.name] += event.self_cpu_time_total
    often = [Counter(event.name for event in events) for events in passes]
    head = f"{'':<52} forward backward  own µs, profiled"
    return [head] + [
        f"{name[:52]:<52} {often[0][name]:7d} {often[1][name]:8d} {time:8.0f}"
        for name, time in own.most_common(rows)
    ]


# ---- time ------------------------------------------------------------


def microseconds(run: Callable[[], object], repeats: int) -> float:
    """Of this process, in the fastest tenth of the calls: others share the machine."""
    times = []
    for _ in range(repeats):
        begin = process_time()
        run()
        times.append(1e6 * (process_time() - begin))
    return sorted(times)[repeats // 10]


def timed(sizes: Sizes, repeats: int, *, autocast: bool) -> tuple[float, float]:
    """Microseconds of a forward pass, and of a forward and a backward pass."""
    with no_gpu():
        layer = Layer(sizes, autocast=autocast)
        return microseconds(layer.forward, repeats), microseconds(layer.step, repeats)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--repeats", type=int, default=500)
    parser.add_argument("--rows", type=int, default=30, help="of the table of contributors")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    for autocast in (False, True):
        forward, step = timed(NARROW, args.repeats, autocast=autocast)
        dtype = "bfloat16 autocast" if autocast else "float32"
        print(f"host time of a layer, {dtype}: forward {forward:.0f} µs, with backward {step:.0f}")
    passes = counted(NSA_SMALL, autocast=True)
    for name, events in zip(("forward", "backward"), passes, strict=True):
        print(
            f"{name:<9}", *(f"{key} {n}" for key, n in counts(events)._asdict().items()), sep="  "
        )
    print(*contributors(counted(NARROW, autocast=False), args.rows), sep="\n")


if __name__ == "__main__":
    main()
