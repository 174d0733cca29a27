"""Judge a kernel by the float64 reference: it may err twice as much as the float32 reference."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU runs Triton's interpreter


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, device=DEVICE)


def heads(B: int, T: int, K: int, H: int, G: int, D: int, Dv: int) -> tuple[Tensor, ...]:
    """q [B, T, H, D], k [B, K, G, D] and v [B, K, G, Dv]."""
    return random(B, T, H, D), random(B, K, G, D), random(B, K, G, Dv)


def values_and_gradients(
    op: Callable, inputs: Sequence[Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """What op returns, then the gradients of a fixed random functional of it."""
    leaves = [x.detach().to(dtype).requires_grad_() for x in inputs]
    outs = op(*leaves)
    outs = list(outs) if isinstance(outs, tuple) else [outs]
    generator = torch.Generator(DEVICE).manual_seed(1)
    loss = torch.zeros((), dtype=dtype, device=DEVICE)
    for out in outs:
        weight = torch.randn(out.shape, generator=generator, device=DEVICE).to(out.dtype)
        loss = loss + (torch.where(meaningful(out), out, 0.0) * weight).sum()
    grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    filled = (torch.zeros_like(x) if g is None else g for x, g in zip(leaves, grads, strict=True))
    return [*outs, *filled]


def meaningful(x: Tensor) -> Tensor:
    return x.isfinite() & (x > -1e30)


def assert_no_worse(
    op: Callable, oracle: Callable, *inputs: Tensor, logits: float = 4.0, repeat: bool = False
) -> None:
    """Every output and every gradient; with repeat, also a second run, bit for bit.

    Beside twice the eager error, the budget has a few roundings of the largest value: as many as
    the largest logit, since lse is stored in float32 and probabilities are recomputed from it.
    """
    got = values_and_gradients(op, inputs, torch.float32)
    eager = values_and_gradients(oracle, inputs, torch.float32)
    want = values_and_gradients(oracle, inputs, torch.float64)
    top = max(largest(w) for w in want)
    for place, (g, e, w) in enumerate(zip(got, eager, want, strict=True)):
        assert torch.equal(meaningful(g), meaningful(w)), f"tensor {place}: where it is finite"
        error, allowed = (largest((x.double() - w).where(meaningful(w), 0.0)) for x in (g, e))
        budget = 2 * allowed + logits * torch.finfo(torch.float32).eps * top
        assert error <= budget, f"tensor {place}: error {error:.1e} over budget {budget:.1e}"
    if repeat:
        again = values_and_gradients(op, inputs, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True)), "runs differ"


def largest(x: Tensor) -> float:
    x = x[meaningful(x)]
    return x.abs().max().item() if x.numel() else 0.0
