"""Cross-entropy of rows of logits, which become their own gradient: one pass in, one pass out.

Letters: N rows, V vocabulary.
"""

import torch
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nsa.kernels.jit import jit
from nsa.kernels.primitives import finite, power_of_2

BLOCK = 4096  # logits at once


@jit
def cross_entropy_kernel(
    logits_ptr, labels_ptr, nats_ptr, V: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr
):  # fmt: skip
    """One row: the nats of its label; with GRADIENT, softmax less one-hot in place of its logits.

    A row whose label is negative is not scored: its nats and its gradient are 0.
    """
    row = tl.program_id(0).to(tl.int64)
    logits_ptr += row * V
    label = tl.load(labels_ptr + row)
    of_label = tl.load(logits_ptr + label, mask=label >= 0, other=0.0).to(tl.float32)
    offs = tl.arange(0, BLOCK)
    m = tl.full([BLOCK], float("-inf"), tl.float32)  # each lane sums its own columns
    norm = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        live = start + offs < V
        x = tl.load(logits_ptr + start + offs, mask=live, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, x)
        norm = norm * tl.exp(m - finite(m_new)) + tl.exp(x - finite(m_new))
        m = m_new
    most = tl.max(m, 0)
    lse = most + tl.log(tl.sum(norm * tl.exp(m - most), 0))
    tl.store(nats_ptr + row, tl.where(label >= 0, lse - of_label, 0.0))
    if GRADIENT:
        for start in range(0, V, BLOCK):
            column = start + offs
            x = tl.load(logits_ptr + column, mask=column < V, other=0.0).to(tl.float32)
            p = tl.exp(x - lse)
            p = tl.where(label >= 0, tl.where(column == label, p - 1.0, p), 0.0)
            tl.store(logits_ptr + column, p.to(logits_ptr.dtype.element_ty), mask=column < V)


def cross_entropy_(
    logits: Float[Tensor, "N V"], labels: Int[Tensor, " N"], *, gradient: bool
) -> Float[Tensor, " N"]:
    """Nats of each row's label in float32, 0 where it is negative.

    With `gradient`, `logits` holds the gradient of their sum afterwards.
    """
    N, V = logits.shape
    nats = torch.empty(N, dtype=torch.float32, device=logits.device)
    block = min(BLOCK, power_of_2(V))
    with torch.cuda.device_of(logits):
        cross_entropy_kernel[(N,)](
            logits, labels, nats, V=V, BLOCK=block, GRADIENT=gradient, num_warps=8
        )
    return nats
