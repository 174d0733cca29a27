"""The op over block_order.py: selected attention by lists, chunk by chunk, with its gradients."""

# pyright: reportCallIssue=false

from collections.abc import Callable

import torch
from torch import Tensor

from nsa.kernels.autotune import with_tile
from nsa.kernels.block_order import (
    block_bwd_kernel,
    block_fwd_kernel,
    delta_kernel,
    merge_kernel,
    sum_items_kernel,
    sum_slots_kernel,
)
from nsa.kernels.lists import cut_items, plan_work, sort_slots
from nsa.kernels.op import custom_op, register_autograd, register_fake
from nsa.kernels.primitives import cdiv, padded, precision
from nsa.kernels.tile_sizes import Problem, Tile


@custom_op
def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_gates: Tensor | None,
    length: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [B, T, H, Dv], lse [B, T, H], and what the backward reuses: slots and starts.

    Arrays are contiguous. Only out has a gradient.
    """
    (B, T, H, D), DV, (J, N) = q.shape, v.shape[3], block_indices.shape[2:]
    num_blocks = cdiv(T, length)
    plan = plan_work(q, block_indices, length, max(D, DV))

    def launch(tile: Tile) -> tuple[Tensor, Tensor]:
        out = torch.empty(B, T, H, DV, dtype=v.dtype, device=q.device)
        lse = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
        part = torch.empty(B * plan.chunk_tokens * H * N, DV, dtype=v.dtype, device=q.device)
        part_lse = torch.empty(part.shape[0], dtype=torch.float32, device=q.device)
        for t_base in range(0, T, plan.chunk_tokens):
            tokens = min(plan.chunk_tokens, T - t_base)
            block_fwd_kernel[(plan.items,)](
                q, k, v, slots, starts, ends, item_lists, part, part_lse,
                T, num_blocks, plan.lists, t_base, plan.chunk_tokens, D**-0.5,
                H=H, G=k.shape[2], J=J, N=N, D=D, DV=DV, LENGTH=length, CAUSAL=causal,
                BLOCK_D=padded(D), BLOCK_DV=padded(DV), ITEM=plan.item, PRECISION=precision(),
                ROWS=tile.rows, KEYS=padded(length),
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            merge_kernel[(cdiv(tokens * H // J, 32) * B * J,)](
                part, part_lse, block_indices, out, lse, T, t_base, plan.chunk_tokens,
                H=H, J=J, N=N, DV=DV, BLOCK_DV=padded(DV), ROWS=32, num_warps=4,
            )  # fmt: skip
        return out, lse

    with torch.cuda.device_of(q):
        slots, starts = sort_slots(block_indices, plan, num_blocks)
        ends, item_lists, _ = cut_items(starts, plan)
        out, lse = with_tile(problem("block_fwd", q, v, J, length), launch)
    return out, lse, slots, starts


@custom_op
def attend_blocks_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    out: Tensor,
    lse: Tensor,
    slots: Tensor,
    starts: Tensor,
    dout: Tensor,
    gated: bool,
    length: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and the gates' gradient [B, T, J, N] (of no elements if not gated)."""
    (B, T, H, D), DV, (J, N) = q.shape, v.shape[3], block_indices.shape[2:]
    num_blocks, device = cdiv(T, length), q.device
    plan = plan_work(q, block_indices, length, max(D, DV))
    delta = torch.empty_like(lse)

    def new(allocate: Callable[..., Tensor], *shape: int) -> Tensor:
        return allocate(*shape, dtype=torch.float32, device=device)

    def launch(tile: Tile) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        slot_rows = B * plan.chunk_tokens * H * N
        part_dq = torch.empty(slot_rows, D, dtype=q.dtype, device=device)
        part_dgate = new(torch.empty, slot_rows) if gated else None
        part_dk, part_dv = (new(torch.empty, plan.shared * length, W) for W in (D, DV))
        dq = torch.empty_like(q)
        dk, dv = (new(torch.zeros, B, T, J, W) for W in (D, DV))
        dgates = new(torch.zeros, *(block_indices.shape if gated else (0,)))
        for t_base in range(0, T, plan.chunk_tokens):
            tokens = min(plan.chunk_tokens, T - t_base)
            block_bwd_kernel[(plan.items,)](
                q, k, v, dout, lse, delta,
                slots, starts, ends, item_lists, shared_ends,
                part_dq, part_dgate, part_dk, part_dv, dk, dv,
                T, num_blocks, plan.lists, t_base, plan.chunk_tokens, D**-0.5,
                H=H, G=k.shape[2], J=J, N=N, D=D, DV=DV, LENGTH=length, CAUSAL=causal,
                GATES=gated, BLOCK_D=padded(D), BLOCK_DV=padded(DV), ITEM=plan.item,
                PRECISION=precision(), ROWS=tile.rows, KEYS=padded(length),
                num_warps=tile.warps, num_stages=tile.stages,
            )  # fmt: skip
            for part, total, W in ((part_dk, dk, D), (part_dv, dv, DV)):
                sum_items_kernel[(plan.lists, cdiv(length, 16))](
                    part, total, ends, shared_ends, T, num_blocks, t_base, plan.chunk_tokens,
                    J=J, D=W, LENGTH=length, BLOCK_D=padded(W), KEYS=16, num_warps=4,
                )  # fmt: skip
            sum_slots_kernel[(cdiv(tokens * H // J, 32) * B * J,)](
                part_dq, block_indices, dq, T, t_base, plan.chunk_tokens,
                H=H, J=J, N=N, D=D, BLOCK_D=padded(D), ROWS=32, num_warps=4,
            )  # fmt: skip
            if part_dgate is not None:
                heads = part_dgate.view(B, plan.chunk_tokens, J, N, H // J)[:, :tokens].sum(-1)
                kept = block_indices[:, t_base : t_base + tokens] >= 0
                dgates[:, t_base : t_base + tokens] = torch.where(kept, heads, 0.0)
        return dq, by_key_head(dk, k), by_key_head(dv, v), dgates

    with torch.cuda.device_of(q):
        delta_kernel[(cdiv(lse.numel(), 32),)](
            out, dout, delta, lse.numel(), DV=DV, BLOCK_DV=padded(DV), ROWS=32, num_warps=4
        )
        ends, item_lists, shared_ends = cut_items(starts, plan)
        return with_tile(problem("block_bwd", q, v, J, length), launch)


def problem(kernel: str, q: Tensor, v: Tensor, index_heads: int, length: int) -> Problem:
    _, T, H, D = q.shape
    return Problem(kernel, q.dtype, D, v.shape[3], H // index_heads, T, q.device, block=length)


def by_key_head(total: Tensor, like: Tensor) -> Tensor:
    """The sum over the index heads [B, T, J, D] that share a key head, as `like`."""
    B, T, G, D = like.shape
    if total.shape[2] != G:
        total = total.view(B, T, G, total.shape[2] // G, D).sum(3)
    return total.to(like.dtype)


@register_fake(attend_blocks)
def _(q, k, v, block_indices, block_gates, length, causal):
    plan = plan_work(q, block_indices, length, max(q.shape[3], v.shape[3]))
    out = v.new_empty(*q.shape[:3], v.shape[3])
    lse = q.new_empty(q.shape[:3], dtype=torch.float32)
    slots = q.new_empty(block_indices.numel(), dtype=torch.int32)
    return out, lse, slots, q.new_empty(plan.chunks * plan.lists + 1, dtype=torch.int32)


@register_fake(attend_blocks_backward)
def _(q, k, v, block_indices, out, lse, slots, starts, dout, gated, length, causal):
    dgates = q.new_empty(block_indices.shape if gated else (0,), dtype=torch.float32)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dgates


def _save(ctx, inputs, output):
    q, k, v, block_indices, gates, *ctx.rule = inputs
    ctx.save_for_backward(q, k, v, block_indices, *output)
    ctx.gates = None if gates is None else gates.dtype
    ctx.mark_non_differentiable(*output[1:])  # lse and the lists are for the backward pass
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _dlse, _slots, _starts):
    gated = ctx.gates is not None
    grads = attend_blocks_backward(*ctx.saved_tensors, dout.contiguous(), gated, *ctx.rule)
    dq, dk, dv, dgates = grads
    return dq, dk, dv, None, dgates.to(ctx.gates) if gated else None, None, None


register_autograd(attend_blocks, _backward, setup_context=_save)
