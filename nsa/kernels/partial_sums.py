"""dK and dV whose sums were made in parts: by run of tokens, and by index head of a key head."""

import torch
import triton.language as tl
from torch import Tensor

from nsa.kernels.jit import jit
from nsa.kernels.primitives import cdiv

ENTRIES = 1024  # of a program


@jit
def sum_entries(
    part_ptr, sum_ptr, rows, parts, HEADS: tl.constexpr, D: tl.constexpr, ENTRIES: tl.constexpr
):
    """ENTRIES of [rows, D]: their sum over [parts, rows, HEADS, D], in this order."""
    entry = tl.program_id(0).to(tl.int64) * ENTRIES + tl.arange(0, ENTRIES)
    row, d = entry // D, entry % D
    live = row < rows
    step = (tl.zeros([], tl.int64) + rows) * (HEADS * D)  # from part to part
    source = part_ptr + row * (HEADS * D) + d
    acc = tl.zeros([ENTRIES], tl.float32)
    for _ in range(parts):
        for head in range(HEADS):
            acc += tl.load(source + head * D, mask=live, other=0.0).to(tl.float32)
        source += step
    tl.store(sum_ptr + entry, acc.to(sum_ptr.dtype.element_ty), mask=live)


@jit
def sum_parts_kernel(
    part_dk_ptr, part_dv_ptr, dk_ptr, dv_ptr, rows, parts,
    HEADS: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, ENTRIES: tl.constexpr,
):  # fmt: skip
    """Program (i, 0) sums ENTRIES of dK, program (i, 1) as many of dV."""
    if tl.program_id(1) == 0:
        sum_entries(part_dk_ptr, dk_ptr, rows, parts, HEADS, D, ENTRIES)
    else:
        sum_entries(part_dv_ptr, dv_ptr, rows, parts, HEADS, DV, ENTRIES)


def summed(
    part_dk: Tensor, part_dv: Tensor, k: Tensor, v: Tensor, index_heads: int
) -> tuple[Tensor, Tensor]:
    """dK and dV as k and v [B, S, G, D | Dv], from parts [(parts,) B, S, index_heads, D | Dv].

    Parts are float32, or sums already: those are returned as they are.
    """
    (B, S, G, D), DV = k.shape, v.shape[3]
    if part_dk.dtype == k.dtype and part_dk.numel() == k.numel():
        return part_dk.view_as(k), part_dv.view_as(v)
    dk, dv, rows = torch.empty_like(k), torch.empty_like(v), B * S * G
    parts = part_dk.shape[0] if part_dk.ndim == 5 else 1
    sum_parts_kernel[(cdiv(rows * max(D, DV), ENTRIES), 2)](
        part_dk, part_dv, dk, dv, rows, parts,
        HEADS=index_heads // G, D=D, DV=DV, ENTRIES=ENTRIES, num_warps=4,
    )  # fmt: skip
    return dk, dv
