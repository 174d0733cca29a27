"""The judge of every kernel, for tests and benchmarks: the reference in float64.

A kernel may err as much as the reference in the inputs' dtype does, twice over, plus a few rounding
steps of the largest value. Our own kernels must also write all the memory they return (what they
forget reads as NaN), and give the same bits in a second run.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsa import blocks, reference
from nsa.config import NSAConfig

LOSS = 1e-2  # of importance that rounding may cost a selection
ALLOCATORS = ("empty", "empty_like")  # of torch, that leave memory as they find it


class Verdict(NamedTuple):
    """Whether it holds, by how much (errors over their budgets), and the largest of these."""

    ok: bool
    text: str
    worst: float

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'} {self.text}"


def judge(
    op: Callable,
    oracle: Callable,
    inputs: Sequence[Tensor],
    names: str,
    dtype: torch.dtype,
    *,
    strict: bool = True,
    roundings: float = 4.0,
    floor: float = 0.5,
) -> Verdict:
    """Outputs and gradients of op against those of the oracle in float64.

    Args:
        op, oracle: from `inputs` to a tensor or a tuple of tensors.
        inputs: floating point; rounded to `dtype` first.
        names: of the outputs and then of the inputs' gradients, separated by blanks.
        strict: poison memory, and ask for the same bits in a second run.
        roundings: of the largest value, on top of twice the reference's error. Attention needs as
            many as its largest logit: lse is stored in float32, and probabilities are computed
            from it again.
        floor: roundings are of a tensor's largest value, or of this share of the largest of all
            tensors, where that is more: small gradients are differences of larger numbers.
    """
    with poisoned_empty() if strict else nullcontext():
        got = values_and_gradients(op, inputs, dtype)
        again = values_and_gradients(op, inputs, dtype) if strict else got
    eager = values_and_gradients(oracle, inputs, dtype)
    want = values_and_gradients(oracle, [x.to(dtype) for x in inputs], torch.float64)
    words, ok, worst = [], True, 0.0
    top = max(largest(w) for w in want)
    for name, g, e, w in zip(names.split(), got, eager, want, strict=True):
        finite = meaningful(w)
        error, allowed = (largest((x.double() - w)[finite]) for x in (g, e))
        budget = 2 * allowed + roundings * torch.finfo(g.dtype).eps * max(largest(w), floor * top)
        good = error <= budget and torch.equal(g.isfinite(), w.isfinite())
        good &= torch.equal(meaningful(g), finite)
        ok &= good
        ratio = error / max(budget, 1e-30)
        worst = ratio if ratio != ratio else max(worst, ratio)
        words.append(f"{name} {ratio:.2f}{'' if good else '!'}")
    if not all(
        torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(got, again, strict=True)
    ):
        ok = False
        words.append("NOT THE SAME TWICE")
    return Verdict(ok, " ".join(words), worst)


def assert_no_worse(
    op: Callable,
    oracle: Callable,
    *inputs: Tensor,
    repeat: bool = False,
    roundings: float = 4.0,
) -> None:
    """`judge` in float32, of every output and every gradient; a second run only with `repeat`.

    Eager float32 may be exact where a kernel rounds once (a window of one token), so the floor is
    the largest value itself.
    """
    outputs = oracle(*inputs)
    number = len(outputs) if isinstance(outputs, tuple) else 1
    names = [f"out{i}" for i in range(number)] + [f"d{i}" for i in range(len(inputs))]
    options = {"strict": repeat, "roundings": roundings, "floor": 1.0}
    verdict = judge(op, oracle, inputs, " ".join(names), torch.float32, **options)
    assert verdict.ok, f"errors over their budgets: {verdict.text}"


def values_and_gradients(
    op: Callable, inputs: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """What op returns, then the gradients of a fixed random functional of it."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    outs = op(*leaves)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    generator = torch.Generator(outs[0].device).manual_seed(1)
    loss = torch.zeros((), dtype=torch.float64, device=outs[0].device)
    for out in outs:
        weight = torch.randn(out.shape, generator=generator, device=out.device)
        seen = torch.where(meaningful(out), out, 0.0)
        loss = loss + (seen * weight.to(out.dtype)).sum().double()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    filled = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))
    return [*(out.detach() for out in outs), *filled]


def meaningful(x: Tensor) -> Tensor:
    """Neither infinite nor the lowest finite number, which stands for minus infinity."""
    return x.isfinite() & (x > -1e30)


def largest(x: Tensor) -> float:
    """The largest magnitude; NaN if there is one that stems from a kernel."""
    x = x[~((x <= -1e30) | (x == torch.inf))]
    return x.abs().max().item() if x.numel() else 0.0


def judge_selection(
    select: Callable[..., Tensor],
    q: Tensor,
    k_cmp: Tensor,
    lse: Tensor,
    cfg: NSAConfig,
    dtype: torch.dtype,
    *,
    shared: bool = True,
    document_starts: blocks.Starts = None,
) -> tuple[Verdict, Tensor]:
    """Whether the chosen blocks score as much as the reference's; and the reference's choice.

    Two blocks may score the same within rounding, so what counts is the score that is lost.
    q, k_cmp and lse are float64.
    """
    told: dict[str, Any] = {}  # a `select` that knows no documents is told of none
    if document_starts is not None:
        told["document_starts"] = document_starts
    importance = reference.block_importance(q, k_cmp, lse, cfg, shared, **told)
    want = reference.top_blocks(importance, cfg, **told)
    inputs = (q.to(dtype), k_cmp.to(dtype), lse.to(torch.promote_types(dtype, torch.float32)))
    with poisoned_empty():
        got, again = (select(*inputs, cfg, shared, **told) for _ in range(2))
    rank = blocks.priority(q.shape[1], cfg, q.device, **told).unsqueeze(-2)
    score = torch.where(rank > blocks.FREE, 1e3 * rank, importance.clamp_min(-1e3))

    def kept(index: Tensor) -> Tensor:
        value = score.gather(-1, index.clamp_min(0).long())
        return torch.where(index >= 0, value, 0.0).sum(-1)

    lost = (kept(want) - kept(got)).max().item() if want.numel() else 0.0
    pushed = torch.where(got < 0, 2**30, got)
    ordered = bool(((pushed.diff(dim=-1) > 0) | (pushed[..., 1:] == 2**30)).all())
    counts = torch.equal((got >= 0).sum(-1), (want >= 0).sum(-1))
    ok = counts and ordered and lost <= LOSS and torch.equal(got, again)
    agree = (got == want).double().mean().item() if want.numel() else 1.0
    return Verdict(ok, f"agree {agree:.5f} lost score {lost:.1e}", lost / LOSS), want


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """`torch.empty` or its like, whose memory reads as NaN until somebody writes it."""

    def wrapper(*args, **kwargs) -> Tensor:
        out = allocate(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    return wrapper


@contextmanager
def poisoned_empty() -> Iterator[None]:
    """Memory that a kernel forgot to write reads as NaN, not as luck."""
    allocators = [getattr(torch, name) for name in ALLOCATORS]
    try:
        for name, allocate in zip(ALLOCATORS, allocators, strict=True):
            setattr(torch, name, poisoned(allocate))
        yield
    finally:
        for name, allocate in zip(ALLOCATORS, allocators, strict=True):
            setattr(torch, name, allocate)


@contextmanager
def loop_order(tile_order: bool) -> Iterator[None]:
    """Triton's selected attention in one of its two loop orders, whatever the sizes."""
    from nsa.kernels import selected

    chosen_by_size = selected.prefers_tile_order
    selected.prefers_tile_order = lambda *sizes: tile_order
    try:
        yield
    finally:
        selected.prefers_tile_order = chosen_by_size


@contextmanager
def by_descriptor(always: bool) -> Iterator[None]:
    """Triton's tiles by descriptor wherever shapes and GPU allow it, or nowhere; not by length."""
    from nsa.kernels.tile_order import op

    chosen_by_length = op.DESCRIBED_ROWS
    op.DESCRIBED_ROWS = 0 if always else 2**63
    try:
        yield
    finally:
        op.DESCRIBED_ROWS = chosen_by_length


def any_order(order: bool | None) -> AbstractContextManager:
    """`loop_order`, or for None whatever the sizes choose."""
    return nullcontext() if order is None else loop_order(order)
