"""The head and its cross-entropy without all logits at once: some rows after the other.

A chunk's logits become their own gradient at once, in the forward pass, and then the gradients of
the hidden states and of the head's weights; the backward pass only multiplies. So nothing is
computed twice, and no more than `CHUNK_BYTES` of logits exist.

PyTorch's `linear_cross_entropy` (2.13 and later, with chunks) sums losses in bfloat16 where its
inputs are; Liger's kernel asks the host for the number of labels, which no CUDA graph can hold.

Letters: N tokens, M model width, V vocabulary.
"""

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa.backends import BACKENDS

CHUNK_BYTES = 1 << 29  # of logits at once
ROWS = 256  # a chunk is a multiple of this, if it holds as many


def linear_cross_entropy(
    hidden: Float[Tensor, "N M"],
    weight: Float[Tensor, "V M"],
    labels: Int[Tensor, " N"],
    *,
    counts_correct: bool = False,
) -> tuple[Float[Tensor, ""], Float[Tensor, " N"], Int[Tensor, ""] | None]:
    """The summed nats of the labels under softmax(hidden · weightᵀ), those of each, and how many
    are likeliest.

    A label of −1 is not scored and has 0 nats. The sum alone is differentiable, once, in
    `hidden` and `weight`. Factors are of the dtype that autocast gives a linear layer; nats and
    the weights' gradient are of at least float32, and the gradient of `hidden` is of its own dtype.
    """
    device = hidden.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else hidden.dtype
    learns = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(device, enabled=False):
        nats, of_each, correct = LinearCrossEntropy.apply(
            hidden, weight, labels, dtype, learns, counts_correct
        )
    return nats, of_each, correct if counts_correct else None


class LinearCrossEntropy(torch.autograd.Function):
    """See `linear_cross_entropy`."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        dtype: torch.dtype,
        learns: bool,
        counts_correct: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        x, factor = hidden.to(dtype), weight.to(dtype)
        precise = torch.promote_types(dtype, torch.float32)
        nats = torch.empty(len(hidden), dtype=precise, device=hidden.device)
        correct = torch.zeros((), dtype=torch.int64, device=hidden.device)
        # Of its own dtype: rounded here and once more by the backward pass, it would err more.
        d_hidden = torch.zeros_like(hidden) if learns else None
        d_weight = torch.zeros_like(weight, dtype=precise) if learns else None
        for rows in chunks(len(x), len(weight) * x.element_size()):
            logits = x[rows] @ factor.T
            if counts_correct:
                correct += (logits.argmax(dim=-1) == labels[rows]).sum()
            nats[rows] = cross_entropy_(logits, labels[rows], gradient=learns)
            if d_hidden is not None and d_weight is not None:
                add_product(d_hidden[rows], logits, factor)
                add_product(d_weight, logits.T, x[rows])
            del logits  # before the next ones are made
        ctx.mark_non_differentiable(nats, correct)
        ctx.save_for_backward(d_hidden, None if d_weight is None else d_weight.to(weight.dtype))
        return nats.sum(), nats, correct

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_nats: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * d_nats, d_weight * d_nats, None, None, None, None


def chunks(num_rows: int, bytes_per_row: int) -> list[slice]:
    """All rows in parts of about one size, none of more than `CHUNK_BYTES` but for a single row."""
    most = max(1, CHUNK_BYTES // bytes_per_row)
    size = most // ROWS * ROWS or most
    return [slice(start, start + size) for start in range(0, num_rows, size)]


def add_product(
    total: Float[Tensor, "V M"], a: Float[Tensor, "V n"], b: Float[Tensor, "n M"]
) -> None:
    """total += a · b, summed in the dtype of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


def cross_entropy_(
    logits: Float[Tensor, "n V"], labels: Int[Tensor, " n"], *, gradient: bool
) -> Float[Tensor, " n"]:
    """Nats of each row's label, 0 where it is negative; `logits` may become their sum's gradient.

    By the kernel of `nsa.kernels` on a GPU.
    """
    if logits.is_cuda and "triton" in BACKENDS:
        from nsa.kernels import cross_entropy  # where Triton is

        return cross_entropy.cross_entropy_(logits, labels, gradient=gradient)
    log_p = logits.log_softmax(dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))
    unscored, places = labels < 0, labels.clamp(min=0)[:, None]
    nats = -log_p.gather(1, places)[:, 0].masked_fill(unscored, 0)
    if gradient:
        log_p.exp_().scatter_add_(1, places, log_p.new_tensor(-1.0).expand_as(places))
        logits.copy_(log_p.masked_fill_(unscored[:, None], 0))
    return nats
