"""One kernel's candidate tiles, each compared with the table's tile and then timed.

`Survey` stands where a launcher asks for its tile (`nsa.kernels.autotune.choose`), so what is timed
is what is launched, allocations included. A candidate that does not compile, does not fit or gives
other numbers is a row with its reason, and no time.
"""

from collections.abc import Callable, Sequence
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks.measure import as_tuple, clock_times, forward_and_backward
from benchmarks.workloads import OURS, Workload
from nsa.kernels import autotune
from nsa.kernels.tile_sizes import Problem, Tile, candidates, table_tile, tiles
from nsa.testing import any_order

OP = {"prefix": "compressed", "band": "window", "bits": "selected tiles", "": "selected blocks"}
KINDS = (  # kernel and variant: a mask, or a loop order; the most valuable first
    *(("block_bwd", ""), ("block_fwd", ""), ("merge", "")),
    *(("attend_dkv", "prefix"), ("attend_dq", "prefix"), ("attend_fwd", "prefix")),
    *(("attend_dkv", "band"), ("attend_dq", "band"), ("attend_fwd", "band")),
    *(("select", ""), ("orders", "")),
    *(("attend_dkv", "bits"), ("attend_dq", "bits"), ("attend_fwd", "bits")),
)
FORWARD = "attend_fwd", "block_fwd", "merge", "select"
REHEARSED = tiles((16, 32), (16,), (4, 1))  # candidates in float32 on a CPU
ROUNDINGS = 4  # of the largest value, that two right tiles may differ by
DISAGREEING = 1e-3  # share of chosen blocks, likewise


class Survey:
    """Times a kernel's candidates where it is first launched; other kernels go by the table."""

    def __init__(
        self, kernel: str, variant: str, timer: Callable[[Callable], float] | None
    ) -> None:
        self.kernel, self.variant, self.timer = kernel, variant, timer  # no timer: compile only
        self.rows: list[dict[str, Any]] = []

    def __call__(self, problem: Problem, launch: Callable[[Tile], Any]) -> Tile:
        first = table_tile(problem)
        if (problem.kernel, problem.mask) == (self.kernel, self.variant) and not self.rows:
            want = launch(first)
            self.rows = [self.row(tile, launch, want) for tile in tried(problem)]
            self.rows[0]["table"] = 1
        return first

    def row(self, tile: Tile, launch: Callable[[Tile], Any], want: Any) -> dict[str, Any]:
        row: dict[str, Any] = tile._asdict()
        try:
            error = difference(launch(tile), want)
            if error > 1:
                return row | {"status": "wrong", "error": error}
            ms = self.timer(lambda: launch(tile)) if self.timer else 0.0
            return row | {"status": "ok", "error": error, "ms": ms}
        except (*autotune.UNFIT, torch.OutOfMemoryError) as unfit:
            lines = str(unfit).strip().splitlines() or [""]
            return row | {"status": f"unfit: {type(unfit).__name__}: {lines[0][:120]}"}


def tried(problem: Problem) -> list[Tile]:
    if problem.dtype.itemsize < 4:
        return candidates(problem)
    first = table_tile(problem)
    return [first, *(tile for tile in REHEARSED if tile != first)]


def difference(got: Any, want: Any) -> float:
    """The largest difference of two results over what rounding allows; inf if one is not finite."""
    return max(apart(a, b) for a, b in zip(as_tuple(got), as_tuple(want), strict=True))


def apart(got: Tensor, want: Tensor) -> float:
    if not want.numel():
        return 0.0
    if not want.is_floating_point():
        return (got != want).double().mean().item() / DISAGREEING
    finite = want.isfinite()
    if not torch.equal(got.isfinite(), finite):
        return float("inf")
    a, b = got[finite].float(), want[finite].float()
    allowed = ROUNDINGS * torch.finfo(want.dtype).eps * max(largest(b), 1e-30)
    return largest(a - b) / allowed


def largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def survey(
    w: Workload, kernel: str, variant: str, timer: Callable[[Callable], float] | None
) -> list[dict[str, Any]]:
    """Rows of every candidate of a kernel on one workload.

    Raises:
        Unavailable: where the op is left out at this length.
    """
    if kernel == "orders":
        return orders(w)
    item = OURS["select" if kernel == "select" else OP[variant]](w)
    _ = w.indices  # before the survey begins
    chosen = Survey(kernel, variant, timer)
    with patch.object(autotune, "choose", chosen), any_order(item.order):
        run(item.op, item.inputs, backward=kernel not in FORWARD)
    return chosen.rows


def run(op: Callable[..., Any], inputs: Sequence[Tensor], *, backward: bool) -> None:
    leaves = [x.detach().requires_grad_(backward) for x in inputs]
    out = op(*leaves)
    if backward:
        torch.autograd.grad(out, leaves, torch.randn_like(out))


def orders(w: Workload) -> list[dict[str, Any]]:
    """Forward and backward of selected attention in both loop orders, with the table's tiles."""
    rows = []
    for variant in ("tiles", "blocks"):
        item = OURS[f"selected {variant}"](w)
        with any_order(item.order):
            times = forward_and_backward(item.op, item.inputs, w.device, seconds=0.05)
        rows.append({"variant": variant, "status": "ok", "ms": times["step_ms"]})
    return rows


def clock_milliseconds(run: Callable[[], object]) -> float:
    """Of one call on the host: enough to rehearse."""
    return clock_times(run, 1)[0]
