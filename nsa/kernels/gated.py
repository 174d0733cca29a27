"""The three branches and their gated sum (eq. 5) as one op, so that one gradient serves them all.

Branch i adds g_i O_i to the output, so its dO is g_i dO. With P' = g_i P, which is softmax with lse
lowered by ln g_i,

    dV = P'ᵀ dO,    dS = P' (dP - sum(dO * O_i)),    dg_i = sum(dO * O_i),

so every branch reads the output's own gradient: that of a branch's output is never stored, and the
gradients of the gates are the deltas of the branches. One pass over dO gives all three.
"""

import torch
import triton.language as tl
from jaxtyping import Float, Int
from torch import Tensor

from nsa.config import NSAConfig
from nsa.kernels.block_order.op import attend_blocks, block_gradients
from nsa.kernels.combine import combine_op
from nsa.kernels.compressed import with_memory
from nsa.kernels.jit import jit
from nsa.kernels.primitives import cdiv, load_rows, operands, padded
from nsa.kernels.registration import custom_op, register_autograd, register_fake
from nsa.kernels.selected import dense_blocks, in_order, num_words_of, width_of
from nsa.kernels.tile_order.membership import membership
from nsa.kernels.tile_order.op import attend_tiles, gradients

ROWS = 32  # rows (token, head) a program takes
SMALLEST_GATE = tl.constexpr(1e-30)  # below it a branch has no gradient; ln 0 is no number


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


@custom_op
def gated_attention_op(
    gates: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    compressed: Tensor,
    lse_cmp: Tensor,
    q_rot: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    block_indices: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    tiles: bool,
    causal: bool,
    size: int,
    stride: int,
    memory: int,
    length: int,
    window: int,
    initial: int,
    local: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out [B, T, H, Dv], and what the backward reuses of the selected and the sliding branch.

    compressed and lse_cmp are what `attend_tiles` gave for q, k_cmp, v_cmp; their gradient is part
    of this one's. size, stride and memory are the compressed branch's, length a selected block's;
    initial and local are `attend_blocks`'s.
    """
    if tiles:
        lists = membership(block_indices, num_words_of(k_slc, length))
        starts = lists.new_empty(0)
        selected, lse_slc = attend_tiles(q_rot, k_slc, v_slc, lists, "bits", causal, length, 1, 0)
    else:
        rule = length, causal, initial, local
        selected, lse_slc, lists, starts = attend_blocks(
            q_rot, k_slc, v_slc, block_indices, None, *rule
        )
    sliding, lse_win = attend_tiles(q_rot, k_win, v_win, None, "band", causal, window, 1, 0)
    out = combine_op(gates, compressed, selected, sliding)
    return out, selected, lse_slc, lists, starts, sliding, lse_win


@custom_op
def gated_attention_backward_op(
    gates: Tensor,
    q: Tensor,
    k_cmp: Tensor,
    v_cmp: Tensor,
    compressed: Tensor,
    lse_cmp: Tensor,
    q_rot: Tensor,
    k_slc: Tensor,
    v_slc: Tensor,
    block_indices: Tensor,
    k_win: Tensor,
    v_win: Tensor,
    selected: Tensor,
    lse_slc: Tensor,
    lists: Tensor,
    starts: Tensor,
    sliding: Tensor,
    lse_win: Tensor,
    dout: Tensor,
    tiles: bool,
    causal: bool,
    size: int,
    stride: int,
    memory: int,
    length: int,
    window: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gates, q, k_cmp, v_cmp, q_rot, k_slc, v_slc, k_win, v_win."""
    branches = (compressed, selected, sliding), (lse_cmp, lse_slc, lse_win)
    dgates, delta, lse = weigh(gates, dout, *branches)
    # The selected branch first: its partial results are the largest, and little else is there yet.
    if tiles:
        rule = "bits", causal, length, 1, 0
        dq_rot, dk_slc, dv_slc = gradients(
            q_rot, k_slc, v_slc, lists, lse[1], dout, rule, delta=delta[1]
        )
    else:
        known = lse[1], delta[1], lists, starts, dout
        dq_rot, dk_slc, dv_slc, _ = block_gradients(
            q_rot, k_slc, v_slc, block_indices, *known, False, length, causal
        )
    rule = "band", causal, window, 1, 0
    dq_rot, dk_win, dv_win = gradients(
        q_rot, k_win, v_win, None, lse[2], dout, rule, delta=delta[2], onto=dq_rot
    )
    rule = "prefix", causal, size, stride, memory
    dq, dk_cmp, dv_cmp = gradients(q, k_cmp, v_cmp, None, lse[0], dout, rule, delta=delta[0])
    return dgates, dq, dk_cmp, dv_cmp, dq_rot, dk_slc, dv_slc, dk_win, dv_win


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


@register_fake(gated_attention_op)
def _(gates, q, k_cmp, v_cmp, compressed, lse_cmp, q_rot, k_slc, v_slc, indices, *rest):
    tiles, causal, length = rest[2], rest[3], rest[7]
    initial, local = rest[9:]
    if tiles:
        B, T, J, _ = indices.shape
        lists = indices.new_empty(B, J, num_words_of(k_slc, length), T)
        starts = indices.new_empty(0)
    else:
        rule = length, causal, initial, local
        *_, lists, starts = attend_blocks(q_rot, k_slc, v_slc, indices, None, *rule)
    out, lse = compressed, lse_cmp
    like_out = [out.new_empty(out.shape) for _ in range(3)]
    like_lse = [lse.new_empty(lse.shape) for _ in range(2)]
    return like_out[0], like_out[1], like_lse[0], lists, starts, like_out[2], like_lse[1]


@register_fake(gated_attention_backward_op)
def _(gates, q, k_cmp, v_cmp, compressed, lse_cmp, q_rot, k_slc, v_slc, indices, k_win, v_win, *_):
    inputs = gates, q, k_cmp, v_cmp, q_rot, k_slc, v_slc, k_win, v_win
    return tuple(x.new_empty(x.shape) for x in inputs)


def _save(ctx, inputs, output):
    tensors, ctx.rules = inputs[:12], inputs[12:-2]
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, *_):
    grads = gated_attention_backward_op(*ctx.saved_tensors, dout.contiguous(), *ctx.rules)
    dgates, dq, dk_cmp, dv_cmp, *of_rotated, dk_win, dv_win = grads
    known = None, None  # compressed and its lse
    return dgates, dq, dk_cmp, dv_cmp, *known, *of_rotated, None, dk_win, dv_win, *([None] * 9)


register_autograd(gated_attention_op, _backward, setup_context=_save)


def gated_attention(
    gates: Float[Tensor, "B T H 3"],
    q: Float[Tensor, "B T H D"],
    k_cmp: Float[Tensor, "B C G D"],
    v_cmp: Float[Tensor, "B C G Dv"],
    compressed: Float[Tensor, "B T H Dv"],
    lse: Float[Tensor, "B T H"],
    q_rot: Float[Tensor, "B T H D"],
    k_slc: Float[Tensor, "B T G D"],
    v_slc: Float[Tensor, "B T G Dv"],
    block_indices: Int[Tensor, "B T J N"],
    k_win: Float[Tensor, "B T G D"],
    v_win: Float[Tensor, "B T G Dv"],
    cfg: NSAConfig,
    mem_k: Float[Tensor, "G Nm D"] | None = None,
    mem_v: Float[Tensor, "G Nm Dv"] | None = None,
) -> Float[Tensor, "B T H Dv"]:
    """The sum of the three branches, weighed by gates of 0 to 1.

    compressed and lse are what `compressed_attention` gives for q, k_cmp, v_cmp (and the memory);
    no gradient flows into them, this op's goes to q, k_cmp and v_cmp.
    """
    memory = 0
    if mem_k is not None and mem_v is not None:
        memory = mem_k.shape[1]
        k_cmp, v_cmp = with_memory(mem_k, k_cmp), with_memory(mem_v, v_cmp)
    q, k_cmp, v_cmp, compressed, q_rot, k_slc, v_slc, k_win, v_win = operands(
        q, k_cmp, v_cmp, compressed.detach(), q_rot, k_slc, v_slc, k_win, v_win
    )
    tiles, indices, length = in_order(block_indices, q_rot, v_slc, cfg)
    size, stride = cfg.compress_block_size, cfg.compress_block_sliding_stride
    return gated_attention_op(
        gates.contiguous(), q, k_cmp, v_cmp, compressed, lse.detach().float().contiguous(),
        q_rot, k_slc, v_slc, indices, k_win, v_win,
        tiles, cfg.causal, size, stride, memory, length, cfg.sliding_window_size,
        *dense_blocks(cfg, length, width_of(q_rot, v_slc)),
    )[0]  # fmt: skip
