"""The three branches and their gated sum (eq. 5) as one op, so that one gradient serves them all.

Branch i adds g_i O_i to the output, so its dO is g_i dO. With P' = g_i P, which is softmax with lse
lowered by ln g_i,

    dV = P'ᵀ dO,    dS = P' (dP - sum(dO * O_i)),    dg_i = sum(dO * O_i),

so every branch reads the output's own gradient: that of a branch's output is never stored, and the
gradients of the gates are the deltas of the branches. One pass over dO gives all three.
"""

from collections.abc import Sequence
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from nsa.blocks import Starts
from nsa.config import NSAConfig
from nsa.documents import extents_of
from nsa.kernels.block_order.op import attend_blocks, block_gradients
from nsa.kernels.combine import combine_op
from nsa.kernels.compressed import with_memory
from nsa.kernels.primitives import operands, whole
from nsa.kernels.registration import custom_op, register_autograd, register_fake
from nsa.kernels.selected import dense_blocks, in_order, num_words_of, width_of
from nsa.kernels.tile_order.membership import membership
from nsa.kernels.tile_order.op import Mask, attend_tiles, gradients
from nsa.kernels.weigh import weigh


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
    document_starts: Tensor | None,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """out [B, T, H, Dv] of `Inputs` and `Sizes`, and what is `Known` then."""
    told = Sizes(*sizes)
    selected, lse_slc, members, starts = attend_selected(
        q_rot, k_slc, v_slc, block_indices, document_starts, told
    )
    sliding, lse_win = attend_tiles(q_rot, k_win, v_win, None, document_starts, *told.band)
    out = combine_op(gates, compressed, selected, sliding)
    return out, selected, lse_slc, members, starts, sliding, lse_win


def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    document_starts: Tensor | None,
    sizes: Sizes,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The selected branch in either loop order: its output, lse, members and starts."""
    if not sizes.tile_order:
        return attend_blocks(q, k, v, block_indices, None, document_starts, *sizes.blocks)
    words = membership(block_indices, num_words_of(k, sizes.selected_length))
    attended = attend_tiles(q, k, v, words, document_starts, *sizes.bits)
    return *attended, words, words.new_empty(0)


@custom_op
def gated_attention_backward_op(
    inputs: Sequence[Tensor],
    known: Sequence[Tensor],
    dout: Tensor,
    document_starts: Tensor | None,
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of gates, q, k_cmp, v_cmp, q_rot, k_slc, v_slc, k_win, v_win."""
    x, of, told = Inputs(*inputs), Known(*known), Sizes(*sizes)
    outs, lses = (x.compressed, of.selected, of.sliding), (x.lse_cmp, of.lse_slc, of.lse_win)
    dgates, delta, lse = weigh(x.gates, dout, outs, lses)
    documents = extents_of(document_starts)
    # The selected branch first: its partial results are the largest, and little else is there yet.
    rotated = x.q_rot, x.k_slc, x.v_slc
    if told.tile_order:
        dq_rot, dk_slc, dv_slc = gradients(
            *rotated, of.members, lse[1], dout, told.bits, documents=documents, delta=delta[1]
        )
    else:
        of_rows = lse[1], delta[1], of.members, of.starts, dout
        dq_rot, dk_slc, dv_slc, _ = block_gradients(
            *rotated, x.block_indices, *of_rows, False, told.selected_length, bool(told.causal)
        )
    dq_rot, dk_win, dv_win = gradients(
        x.q_rot, x.k_win, x.v_win, None, lse[2], dout, told.band,
        documents=documents, delta=delta[2], onto=dq_rot,
    )  # fmt: skip
    dq, dk_cmp, dv_cmp = gradients(
        x.q, x.k_cmp, x.v_cmp, None, lse[0], dout, told.prefix, documents=documents, delta=delta[0]
    )
    return dgates, dq, dk_cmp, dv_cmp, dq_rot, dk_slc, dv_slc, dk_win, dv_win


@register_fake(gated_attention_op)
def _(*arguments):
    *tensors, document_starts, sizes = arguments
    x, sizes = Inputs(*tensors), Sizes(*sizes)
    *_, members, starts = attend_selected(
        x.q_rot, x.k_slc, x.v_slc, x.block_indices, document_starts, sizes
    )
    out, selected, sliding = (x.compressed.new_empty(x.compressed.shape) for _ in range(3))
    lse_slc, lse_win = (x.lse_cmp.new_empty(x.lse_cmp.shape) for _ in range(2))
    return out, *Known(selected, lse_slc, members, starts, sliding, lse_win)


@register_fake(gated_attention_backward_op)
def _(inputs, known, dout, document_starts, sizes):
    x = Inputs(*inputs)
    differentiable = x.gates, x.q, x.k_cmp, x.v_cmp, x.q_rot, x.k_slc, x.v_slc, x.k_win, x.v_win
    return tuple(y.new_empty(y.shape) for y in differentiable)


def _save(ctx, inputs, output):
    *tensors, document_starts, ctx.sizes = inputs
    ctx.save_for_backward(document_starts, *tensors, *output[1:])
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, *_):
    number, (document_starts, *saved) = len(Inputs._fields), ctx.saved_tensors
    grads = gated_attention_backward_op(
        saved[:number], saved[number:], dout.contiguous(), document_starts, ctx.sizes
    )
    dgates, dq, dk_cmp, dv_cmp, dq_rot, dk_slc, dv_slc, dk_win, dv_win = grads
    of_rotated = dq_rot, dk_slc, dv_slc, None, dk_win, dv_win  # indices have none
    return dgates, dq, dk_cmp, dv_cmp, None, None, *of_rotated, None, None


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
    *,
    document_starts: Starts = None,
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
        q_rot, k_slc, v_slc, indices, k_win, v_win, whole(document_starts), list(map(int, sizes)),
    )[0]  # fmt: skip
