"""What `benchmarks.attention` times of ours: the whole op and each of its ops.

Letters: B batch (1 here), T tokens, H query heads, G key/value heads, D head dimension, Dv that of
values.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from benchmarks.workers import Unavailable
from nsa import reference
from nsa.backends import BACKENDS, Backend
from nsa.branches import gated_attention
from nsa.config import NSAConfig
from nsa.heads import Projected
from nsa.testing import Verdict, any_order, by_descriptor, judge, judge_selection

PAPER = NSAConfig()  # its sizes are the defaults
BOTH_ORDERS = (True, False)  # of selected attention: query tiles outside, or key blocks outside
TILES_AT_MOST = 32768  # tokens: tiles pass over T x T / 2 scores


@dataclass(frozen=True)
class Layout:
    """How many heads of which width."""

    heads: int
    kv_heads: int
    dim_head: int
    dim_value: int | None = None  # of values, where it is another

    @classmethod
    def of(cls, columns: Mapping[str, Any]) -> "Layout":
        """The layout that has these columns."""
        widths = map(int, str(columns["dim_head"]).split("/"))
        return cls(int(columns["heads"]), int(columns["kv_heads"]), *widths)

    @property
    def name(self) -> str:
        return "{heads}/{kv_heads} D{dim_head}".format(**self.columns)

    @property
    def columns(self) -> dict[str, int | str]:
        widths = f"{self.dim_head}/{self.dim_value}" if self.dim_value else self.dim_head
        return {"heads": self.heads, "kv_heads": self.kv_heads, "dim_head": widths}


LAYOUTS = {
    "64/4": Layout(64, 4, 128),  # the paper's
    "32/8": Layout(32, 8, 128),
    "8/4": Layout(8, 4, 64),
    "16/16": Layout(16, 16, 128),
    "64/4 D192/128": Layout(64, 4, 192, 128),
}


@dataclass(frozen=True)
class Workload:
    """Random inputs of one length, as projections would hand them to the op."""

    layout: Layout
    tokens: int
    dtype: torch.dtype
    device: torch.device
    backend: str
    cfg: NSAConfig = PAPER

    def new(self, heads: int, width: int) -> Tensor:
        shape = (1, self.tokens, heads, width)
        return torch.randn(shape, dtype=self.dtype, device=self.device)

    @property
    def dim_value(self) -> int:
        return self.layout.dim_value or self.layout.dim_head

    @cached_property
    def q(self) -> Tensor:
        return self.new(self.layout.heads, self.layout.dim_head)

    @cached_property
    def q_rot(self) -> Tensor:
        """What the selected and the sliding branch take: in a layer, q rotated."""
        return self.new(self.layout.heads, self.layout.dim_head)

    @cached_property
    def keys_and_values(self) -> list[Tensor]:
        """k and v of the compressed, the selected and the sliding branch."""
        widths = [self.layout.dim_head, self.dim_value] * 3
        return [self.new(self.layout.kv_heads, width) for width in widths]

    @cached_property
    def qkv(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q, self.keys_and_values[0], self.keys_and_values[1]

    @cached_property
    def gates(self) -> Tensor:
        shape = (1, self.tokens, self.layout.heads, 3)
        return torch.rand(shape, dtype=self.dtype, device=self.device)

    @cached_property
    def compressed(self) -> tuple[Tensor, Tensor]:
        """k_cmp and v_cmp."""
        _, *kv = self.qkv
        k_cmp, v_cmp = (self.ops.block_means(x, self.cfg) for x in kv)
        return k_cmp, v_cmp

    @cached_property
    def lse(self) -> Tensor:
        return self.ops.compressed_attention(self.q, *self.compressed, self.cfg)[1]

    @cached_property
    def indices(self) -> Tensor:
        """The blocks that this backend selects."""
        return self.ops.select_blocks(self.q, self.compressed[0], self.lse, self.cfg)

    @property
    def ops(self) -> Backend:
        return BACKENDS[self.backend]

    def compare(
        self,
        op: Callable,
        oracle: Callable,
        inputs: Sequence[Tensor],
        names: str,
        *,
        order: bool | None = None,
        strict: bool = True,
    ) -> Callable[[], Verdict]:
        """A check to be run later: `judge`, with selected attention in one loop order.

        Ours are judged by address and by descriptor, since which it is depends on T.
        """

        def check() -> Verdict:
            ours = strict and self.backend == "triton"
            verdicts = []
            for way in (by_descriptor(False), by_descriptor(True)) if ours else (nullcontext(),):
                with any_order(order), way:
                    verdicts.append(judge(op, oracle, inputs, names, self.dtype, strict=strict))
            failed = [verdict for verdict in verdicts if not verdict.ok]
            return failed[0] if failed else max(verdicts, key=lambda verdict: verdict.worst)

        return check

    @property
    def orders(self) -> Sequence[bool | None]:
        """The loop orders to check: which one is taken depends on T, and T is small in a check."""
        return BOTH_ORDERS if self.backend == "triton" else (None,)


@dataclass(frozen=True)
class Item:
    """One op to time on its inputs, once its checks hold."""

    op: Callable[..., Any]
    inputs: Sequence[Tensor]
    checks: Sequence[Callable[[], Verdict]]
    differentiable: bool = True
    order: bool | None = None
    unchecked: str = ""  # why there are no checks


def nsa(
    w: Workload,
    backend: str,
    inputs: Sequence[Tensor],
    indices: Tensor | None = None,
    *,
    document_starts: Tensor | None = None,
) -> Tensor:
    """From projected heads to the gated sum; without `indices` the backend selects its own."""
    gates, q, q_rot, k, v, *rotated = inputs
    means = BACKENDS[backend].block_means
    compressed = means(k, w.cfg), means(v, w.cfg)
    projected = Projected(q, *compressed, None, None, q_rot, *rotated, gates, document_starts)
    return gated_attention(projected, w.cfg, backend=backend, block_indices=indices)


def whole(w: Workload) -> Item:
    """`nsa`, judged with the blocks it selects itself, since ties may be broken either way."""

    def op(*inputs: Tensor) -> Tensor:
        return nsa(w, w.backend, inputs)

    def oracle(*inputs: Tensor) -> Tensor:
        return nsa(w, "reference", inputs, w.indices)

    inputs = (w.gates, w.q, w.q_rot, *w.keys_and_values)
    names = "out dgates dq dq_rot dk_cmp dv_cmp dk_slc dv_slc dk_win dv_win"
    checks = [w.compare(op, oracle, inputs, names, order=order) for order in w.orders]
    return Item(op, inputs, [*select(w).checks, *checks])


def compressed(w: Workload) -> Item:
    inputs = (w.q, *w.compressed)
    check = w.compare(
        lambda q, k, v: w.ops.compressed_attention(q, k, v, w.cfg),
        lambda q, k, v: reference.compressed_attention(q, k, v, w.cfg),
        inputs,
        "out lse dq dk dv",
    )

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return w.ops.compressed_attention(q, k, v, w.cfg)[0]

    return Item(op, inputs, [check])


def select(w: Workload) -> Item:
    def check() -> Verdict:
        q, k_cmp, v_cmp = (x.double() for x in (w.q, *w.compressed))
        lse = reference.compressed_attention(q, k_cmp, v_cmp, w.cfg)[1]
        return judge_selection(w.ops.select_blocks, q, k_cmp, lse, w.cfg, w.dtype)[0]

    def op(q: Tensor, k_cmp: Tensor, lse: Tensor) -> Tensor:
        return w.ops.select_blocks(q, k_cmp, lse, w.cfg)

    inputs = (w.q, w.compressed[0], w.lse)
    return Item(op, inputs, [check], differentiable=False)


def selected(w: Workload, order: bool | None = None) -> Item:
    if order is not None and w.backend != "triton":
        raise Unavailable(f"backend {w.backend} has one loop order")
    if order and w.tokens > TILES_AT_MOST:
        raise Unavailable(f"tiles pass over every key: left out beyond {TILES_AT_MOST} tokens")

    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return w.ops.selected_attention(q, k, v, w.indices, w.cfg)

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.selected_attention(q, k, v, w.indices, w.cfg)

    orders = w.orders if order is None else (order,)
    checks = [w.compare(op, oracle, w.qkv, "out dq dk dv", order=each) for each in orders]
    return Item(op, w.qkv, checks, order=order)


def window(w: Workload) -> Item:
    def op(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return w.ops.sliding_window_attention(q, k, v, w.cfg)

    def oracle(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return reference.sliding_window_attention(q, k, v, w.cfg)

    check = w.compare(op, oracle, w.qkv, "out dq dk dv")
    return Item(op, w.qkv, [check])


def combine(w: Workload) -> Item:
    inputs = (w.gates, *(w.new(w.layout.heads, w.dim_value) for _ in range(3)))
    check = w.compare(w.ops.combine, reference.combine, inputs, "out dgates da db dc")
    return Item(w.ops.combine, inputs, [check])


def pool(w: Workload) -> Item:
    """Both keys and values, as in the whole."""

    def op(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return w.ops.block_means(k, w.cfg), w.ops.block_means(v, w.cfg)

    def windows(*kv: Tensor) -> tuple[Tensor, ...]:
        size, stride = w.cfg.compress_block_size, w.cfg.compress_block_sliding_stride
        return tuple(x.unfold(1, size, stride).mean(-1) for x in kv)

    inputs = w.qkv[1:]
    check = w.compare(op, windows, inputs, "k v dk dv")
    return Item(op, inputs, [check])


OURS: dict[str, Callable[[Workload], Item]] = {
    "nsa": whole,
    "compressed": compressed,
    "select": select,
    "selected": selected,
    "selected tiles": lambda w: selected(w, order=True),
    "selected blocks": lambda w: selected(w, order=False),
    "window": window,
    "combine": combine,
    "pool": pool,
}
