"""dK and dV summed from partial sums: of a run of tokens, and of an index head of a key head."""

import torch
import triton.language as tl
from torch import Tensor

from nsa.kernels.jit import jit
from nsa.kernels.primitives import cdiv

ENTRIES = 1024  # of a program


@jit
def sum_entries(
    partial_ptr, sum_ptr, rows, num_partials,
    HEADS: tl.constexpr, D: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """ENTRIES of [rows, D]: their sum over [num_partials, rows, HEADS, D], in a fixed order."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    row, d = entry // D, entry % D
    live = row < rows
    step = (tl.zeros([], tl.int64) + rows) * (HEADS * D)  # from one partial sum to the next
    source = partial_ptr + row * (HEADS * D) + d
    acc = tl.zeros([ENTRIES], tl.float32)
    for _ in range(num_partials):
        for head in range(HEADS):
            acc += tl.load(source + head * D, mask=live, other=0.0).to(tl.float32)
        source += step
    tl.store(sum_ptr + entry, acc.to(sum_ptr.dtype.element_ty), mask=live)


@jit
def sum_partials_kernel(
    partial_dk_ptr, partial_dv_ptr, dk_ptr, dv_ptr, rows, num_partials,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Program (i, 0) sums ENTRIES of dK, program (i, 1) as many of dV."""
    if tl.program_id(1) == 0:
        sum_entries(partial_dk_ptr, dk_ptr, rows, num_partials, HEADS, D, ENTRIES)
    else:
        sum_entries(partial_dv_ptr, dv_ptr, rows, num_partials, HEADS, DV, ENTRIES)


def summed(
    partial_dk: Tensor, partial_dv: Tensor, k: Tensor, v: Tensor, index_heads: int
) -> tuple[Tensor, Tensor]:
    """dK and dV as k and v [B, S, G, D | Dv], from partial sums [(n,) B, S, index_heads, D | Dv].

    Partial sums are float32. What is in k's dtype and shape is the sum already, and is returned.
    """
    (B, S, G, D), DV = k.shape, v.shape[3]
    if partial_dk.dtype == k.dtype and partial_dk.numel() == k.numel():
        return partial_dk.view_as(k), partial_dv.view_as(v)
    dk, dv, rows = torch.empty_like(k), torch.empty_like(v), B * S * G
    num_partials = partial_dk.shape[0] if partial_dk.ndim == 5 else 1
    sum_partials_kernel[(cdiv(rows * max(D, DV), ENTRIES), 2)](
        partial_dk, partial_dv, dk, dv, rows, num_partials,
        HEADS=index_heads // G, D=D, DV=DV, ENTRIES=ENTRIES, num_warps=4,
    )  # fmt: skip
    return dk, dv
