"""One pass over dO for all branches: the gates' gradients, and each branch's delta and lse - ln g.

See gated.py for what they are.
"""

import torch
import triton.language as tl
from torch import Tensor

from nsa.kernels.jit import jit
from nsa.kernels.primitives import cdiv, load_rows, padded

ROWS = 32  # rows (token, head) a program takes
SMALLEST_GATE = tl.constexpr(1e-30)  # below it a branch has no gradient; ln 0 is not finite


@jit
def weigh_branch(
    gate_ptr, x_ptr, lse_ptr, dgate_ptr, delta_ptr, gated_lse_ptr, rows, live, dout,
    DV: tl.constexpr, PADDED_DV: tl.constexpr,
):  # fmt: skip
    """One branch of weigh_kernel."""
    x = load_rows(x_ptr, rows, live, DV, PADDED_DV).to(tl.float32)
    delta = tl.sum(x * dout, 1)
    tl.store(dgate_ptr + rows * 3, delta.to(dgate_ptr.dtype.element_ty), mask=live)
    tl.store(delta_ptr + rows, delta, mask=live)
    gate = tl.load(gate_ptr + rows * 3, mask=live, other=1.0).to(tl.float32)
    lse = tl.load(lse_ptr + rows, mask=live, other=0.0)
    tl.store(gated_lse_ptr + rows, lse - tl.log(tl.maximum(gate, SMALLEST_GATE)), mask=live)


@jit
def weigh_kernel(
    gates_ptr, dout_ptr, a_ptr, b_ptr, c_ptr, lse_a_ptr, lse_b_ptr, lse_c_ptr,
    dgates_ptr, delta_ptr, gated_lse_ptr, num_rows,
    DV: tl.constexpr, PADDED_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows: the gates' gradients, and of each branch delta and lse - ln g.  [3, num_rows]"""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < num_rows
    dout = load_rows(dout_ptr, rows, live, DV, PADDED_DV).to(tl.float32)
    weigh_branch(
        gates_ptr, a_ptr, lse_a_ptr, dgates_ptr, delta_ptr, gated_lse_ptr,
        rows, live, dout, DV, PADDED_DV,
    )  # fmt: skip
    delta_ptr += num_rows
    gated_lse_ptr += num_rows
    weigh_branch(
        gates_ptr + 1, b_ptr, lse_b_ptr, dgates_ptr + 1, delta_ptr, gated_lse_ptr,
        rows, live, dout, DV, PADDED_DV,
    )  # fmt: skip
    delta_ptr += num_rows
    gated_lse_ptr += num_rows
    weigh_branch(
        gates_ptr + 2, c_ptr, lse_c_ptr, dgates_ptr + 2, delta_ptr, gated_lse_ptr,
        rows, live, dout, DV, PADDED_DV,
    )  # fmt: skip


def weigh(
    gates: Tensor,
    dout: Tensor,
    outs: tuple[Tensor, Tensor, Tensor],
    lses: tuple[Tensor, Tensor, Tensor],
) -> tuple[Tensor, Tensor, Tensor]:
    """The gates' gradients; delta and lse - ln g of each branch [3, B, T, H]."""
    width = dout.shape[3]
    dgates, num_rows = torch.empty_like(gates), dout.numel() // max(1, width)
    shape, device = (3, *dout.shape[:3]), dout.device
    delta, lse = (torch.empty(shape, dtype=torch.float32, device=device) for _ in range(2))
    with torch.cuda.device_of(dout):
        weigh_kernel[(cdiv(num_rows, ROWS),)](
            gates, dout, *outs, *lses, dgates, delta, lse, num_rows,
            DV=width, PADDED_DV=padded(width), ROWS=ROWS, num_warps=4,
        )  # fmt: skip
    return dgates, delta, lse
