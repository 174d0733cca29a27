"""The three branches and their gated sum (eq. 5) as one op, so that one gradient serves them all.

Branch i adds g_i O_i to the output, so its dO is g_i dO. With P' = g_i P, which is softmax with lse
lowered by ln g_i,

    dV = P'ᵀ dO,    dS = P' (dP - sum(dO * O_i)),    dg_i = sum(dO * O_i),

so every branch reads the output's own gradient: that of a branch's output is never stored, and the
gradients of the gates are the deltas of the branches. One pass over dO gives all three.
"""

from collections.abc import Sequence
from typing import NamedTuple

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
from nsa.kernels.tile_order.op import Mask, attend_tiles, gradients

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


class Inputs(NamedTuple):
    """The op's tensors, in the order of its arguments.

    compressed and lse_cmp are what `attend_tiles` gave for q, k_cmp and v_cmp; their gradient is
    in this op's.
    """

    gates: Tensor
    q: Tensor
    k_cmp: Tensor
    v_cmp: Tensor
    compressed: Tensor
    lse_cmp: Tensor
    q_rot: Tensor
    k_slc: Tensor
    v_slc: Tensor
    block_indices: Tensor
    k_win: Tensor
    v_win: Tensor


class Sizes(NamedTuple):
    """What the op is told of its branches; as integers, since the op takes a list of them."""

    tile_order: int  # 1: selected attention in the tile order, 0: in the block order
    causal: int
    compress_block_size: int
    compress_block_sliding_stride: int
    memory: int  # keys before the compressed ones that every token sees
    selected_length: int  # tokens of a selected block, after splitting
    sliding_window_size: int
    initial: int  # dense blocks, as `attend_blocks` takes them
    local: int

    @property
    def prefix(self) -> Mask:
        """The compressed branch's mask."""
        size, stride = self.compress_block_size, self.compress_block_sliding_stride
        return Mask("prefix", bool(self.causal), size, stride, self.memory)

    @property
    def bits(self) -> Mask:
        """The selected branch's mask, in the tile order."""
        return Mask("bits", bool(self.causal), self.selected_length)

    @property
    def band(self) -> Mask:
        """The sliding branch's mask."""
        return Mask("band", bool(self.causal), self.sliding_window_size)

    @property
    def blocks(self) -> tuple[int, bool, int, int]:
        """What `attend_blocks` takes."""
        return self.selected_length, bool(self.causal), self.initial, self.local


class Known(NamedTuple):
    """What the backward pass needs of the selected and the sliding branch."""

    selected: Tensor
    lse_slc: Tensor
    members: Tensor  # who keeps which block: words of bits, or the block order's slots
    starts: Tensor  # where each block's slots start; empty in the tile order
    sliding: Tensor
    lse_win: Tensor


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
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out [B, T, H, Dv] of `Inputs` and `Sizes`, and what is `Known` then."""
    told = Sizes(*sizes)
    selected, lse_slc, members, starts = attend_selected(q_rot, k_slc, v_slc, block_indices, told)
    sliding, lse_win = attend_tiles(q_rot, k_win, v_win, None, *told.band)
    out = combine_op(gates, compressed, selected, sliding)
    return out, selected, lse_slc, members, starts, sliding, lse_win


def attend_selected(
    q: Tensor, k: Tensor, v: Tensor, block_indices: Tensor, sizes: Sizes
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The selected branch in either loop order: its output, lse, members and starts."""
    if not sizes.tile_order:
        return attend_blocks(q, k, v, block_indices, None, *sizes.blocks)
    words = membership(block_indices, num_words_of(k, sizes.selected_length))
    return *attend_tiles(q, k, v, words, *sizes.bits), words, words.new_empty(0)


@custom_op
def gated_attention_backward_op(
    inputs: Sequence[Tensor], known: Sequence[Tensor], dout: Tensor, sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gates, q, k_cmp, v_cmp, q_rot, k_slc, v_slc, k_win, v_win."""
    x, of, told = Inputs(*inputs), Known(*known), Sizes(*sizes)
    outs, lses = (x.compressed, of.selected, of.sliding), (x.lse_cmp, of.lse_slc, of.lse_win)
    dgates, delta, lse = weigh(x.gates, dout, outs, lses)
    # The selected branch first: its partial results are the largest, and little else is there yet.
    rotated = x.q_rot, x.k_slc, x.v_slc
    if told.tile_order:
        dq_rot, dk_slc, dv_slc = gradients(
            *rotated, of.members, lse[1], dout, told.bits, delta=delta[1]
        )
    else:
        of_rows = lse[1], delta[1], of.members, of.starts, dout
        dq_rot, dk_slc, dv_slc, _ = block_gradients(
            *rotated, x.block_indices, *of_rows, False, told.selected_length, bool(told.causal)
        )
    dq_rot, dk_win, dv_win = gradients(
        x.q_rot, x.k_win, x.v_win, None, lse[2], dout, told.band, delta=delta[2], onto=dq_rot
    )
    dq, dk_cmp, dv_cmp = gradients(
        x.q, x.k_cmp, x.v_cmp, None, lse[0], dout, told.prefix, delta=delta[0]
    )
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
def _(*arguments):
    x, sizes = Inputs(*arguments[:-1]), Sizes(*arguments[-1])
    *_, members, starts = attend_selected(x.q_rot, x.k_slc, x.v_slc, x.block_indices, sizes)
    out, selected, sliding = (x.compressed.new_empty(x.compressed.shape) for _ in range(3))
    lse_slc, lse_win = (x.lse_cmp.new_empty(x.lse_cmp.shape) for _ in range(2))
    return out, *Known(selected, lse_slc, members, starts, sliding, lse_win)


@register_fake(gated_attention_backward_op)
def _(inputs, known, dout, sizes):
    x = Inputs(*inputs)
    differentiable = x.gates, x.q, x.k_cmp, x.v_cmp, x.q_rot, x.k_slc, x.v_slc, x.k_win, x.v_win
    return tuple(y.new_empty(y.shape) for y in differentiable)


def _save(ctx, inputs, output):
    *tensors, ctx.sizes = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, *_):
    number, saved = len(Inputs._fields), ctx.saved_tensors
    grads = gated_attention_backward_op(
        saved[:number], saved[number:], dout.contiguous(), ctx.sizes
    )
    dgates, dq, dk_cmp, dv_cmp, dq_rot, dk_slc, dv_slc, dk_win, dv_win = grads
    of_rotated = dq_rot, dk_slc, dv_slc, None, dk_win, dv_win  # indices have none
    return dgates, dq, dk_cmp, dv_cmp, None, None, *of_rotated, None


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
    tile_order, indices, length = in_order(block_indices, q_rot, v_slc, cfg)
    sizes = Sizes(
        tile_order, cfg.causal, cfg.compress_block_size, cfg.compress_block_sliding_stride, memory,
        length, cfg.sliding_window_size, *dense_blocks(cfg, length, width_of(q_rot, v_slc)),
    )  # fmt: skip
    return gated_attention_op(
        gates.contiguous(), q, k_cmp, v_cmp, compressed, lse.detach().float().contiguous(),
        q_rot, k_slc, v_slc, indices, k_win, v_win, list(map(int, sizes)),
    )[0]  # fmt: skip
