"""The gated sum of the three branches (eq. 5), one pass forward and one backward."""

import torch
import triton.language as tl
from jaxtyping import Float
from torch import Tensor

from nsa.kernels.jit import jit
from nsa.kernels.primitives import cdiv, load_rows, padded, store_rows
from nsa.kernels.registration import custom_op, register_autograd, register_fake

ROWS = 32  # rows (token, head) a program takes


@jit
def combine_fwd_kernel(
    gates_ptr, a_ptr, b_ptr, c_ptr, out_ptr, num_rows,
    DV: tl.constexpr, PADDED_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows: out = g0 * a + g1 * b + g2 * c."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < num_rows
    g0 = tl.load(gates_ptr + rows * 3, mask=live, other=0.0).to(tl.float32)
    g1 = tl.load(gates_ptr + rows * 3 + 1, mask=live, other=0.0).to(tl.float32)
    g2 = tl.load(gates_ptr + rows * 3 + 2, mask=live, other=0.0).to(tl.float32)
    out = g0[:, None] * load_rows(a_ptr, rows, live, DV, PADDED_DV).to(tl.float32)
    out += g1[:, None] * load_rows(b_ptr, rows, live, DV, PADDED_DV).to(tl.float32)
    out += g2[:, None] * load_rows(c_ptr, rows, live, DV, PADDED_DV).to(tl.float32)
    store_rows(out_ptr, rows, live, out, DV, PADDED_DV)


@jit
def combine_branch_bwd(
    g_ptr, x_ptr, dg_ptr, dx_ptr, rows, live, dout, DV: tl.constexpr, PADDED_DV: tl.constexpr
):
    """One branch of combine_bwd_kernel: the gate's gradient and the branch's."""
    g = tl.load(g_ptr + rows * 3, mask=live, other=0.0).to(tl.float32)
    x = load_rows(x_ptr, rows, live, DV, PADDED_DV).to(tl.float32)
    dg = tl.sum(x * dout, 1)
    tl.store(dg_ptr + rows * 3, dg.to(dg_ptr.dtype.element_ty), mask=live)
    store_rows(dx_ptr, rows, live, g[:, None] * dout, DV, PADDED_DV)


@jit
def combine_bwd_kernel(
    gates_ptr, a_ptr, b_ptr, c_ptr, dout_ptr, dgates_ptr, da_ptr, db_ptr, dc_ptr, num_rows,
    DV: tl.constexpr, PADDED_DV: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """ROWS rows: dg = sum(branch * dO) and d(branch) = g * dO; dO is read once for all three."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    live = rows < num_rows
    dout = load_rows(dout_ptr, rows, live, DV, PADDED_DV).to(tl.float32)
    combine_branch_bwd(gates_ptr, a_ptr, dgates_ptr, da_ptr, rows, live, dout, DV, PADDED_DV)
    combine_branch_bwd(
        gates_ptr + 1, b_ptr, dgates_ptr + 1, db_ptr, rows, live, dout, DV, PADDED_DV
    )
    combine_branch_bwd(
        gates_ptr + 2, c_ptr, dgates_ptr + 2, dc_ptr, rows, live, dout, DV, PADDED_DV
    )


def launch(kernel, x: Tensor, *arrays: Tensor) -> None:
    num_rows, width = x.numel() // x.shape[-1], x.shape[-1]
    with torch.cuda.device_of(x):
        kernel[(cdiv(num_rows, ROWS),)](
            *arrays, num_rows, DV=width, PADDED_DV=padded(width), ROWS=ROWS, num_warps=4
        )


@custom_op
def combine_op(gates: Tensor, a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    out = torch.empty_like(a)
    launch(combine_fwd_kernel, a, gates, a, b, c, out)
    return out


@custom_op
def combine_backward_op(
    gates: Tensor, a: Tensor, b: Tensor, c: Tensor, dout: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dgates, da, db, dc = (torch.empty_like(x) for x in (gates, a, b, c))
    launch(combine_bwd_kernel, a, gates, a, b, c, dout, dgates, da, db, dc)
    return dgates, da, db, dc


@register_fake(combine_op)
def _(gates, a, b, c):
    return a.new_empty(a.shape)


@register_fake(combine_backward_op)
def _(gates, a, b, c, dout):
    return tuple(x.new_empty(x.shape) for x in (gates, a, b, c))


def _backward(ctx, dout):
    return combine_backward_op(*ctx.saved_tensors, dout.contiguous())


register_autograd(
    combine_op,
    _backward,
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


def combine(
    gates: Float[Tensor, "B T H 3"],
    compressed: Float[Tensor, "B T H Dv"],
    selected: Float[Tensor, "B T H Dv"],
    sliding: Float[Tensor, "B T H Dv"],
) -> Float[Tensor, "B T H Dv"]:
    """g_cmp * compressed + g_slc * selected + g_win * sliding, summed in float32."""
    return combine_op(*(x.contiguous() for x in (gates, compressed, selected, sliding)))
