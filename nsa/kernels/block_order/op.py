"""Selected attention block by block, chunk after chunk, with its gradients: the op."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from nsa.kernels.autotune import with_tile
from nsa.kernels.block_order.backward import (
    block_bwd_kernel,
    delta_kernel,
    sum_items_kernel,
    sum_slots_kernel,
)
from nsa.kernels.block_order.forward import block_fwd_kernel, merge_kernel
from nsa.kernels.block_order.inverted_lists import (
    Chunk,
    Plan,
    Work,
    chunks_of,
    cut_items,
    plan_work,
    sort_slots,
)
from nsa.kernels.columns import key_slice
from nsa.kernels.partial_sums import summed
from nsa.kernels.primitives import cdiv, padded, power_of_2, precision
from nsa.kernels.registration import custom_op, register_autograd, register_fake
from nsa.kernels.tile_sizes import Problem, Tile, table_tile

MERGE_REGISTERS = 168  # a thread's, at most: three programs of four warps a multiprocessor


@custom_op
def attend_blocks(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    block_gates: Tensor | None,
    document_starts: Tensor | None,
    length: int,
    causal: bool,
    initial: int,
    local: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """out [B, T, H, Dv], lse [B, T, H], and what the backward reuses: slots and starts.

    Arrays are contiguous. Only out has a gradient. The `initial` first blocks of a document and a
    token's `local` last ones, where kept, are attended to densely; if causal alone there are any.
    """
    plan = plan_work(q, block_indices, length, max(q.shape[3], v.shape[3]))
    with torch.cuda.device_of(q):
        slots, starts = sort_slots(block_indices, plan, cdiv(q.shape[1], length))
        work = cut_items(slots, starts, plan, length, causal=causal)
        launch = partial(
            launch_forward, q, k, v, document_starts, block_indices, work,
            dict(INITIAL=initial, LOCAL=local),
        )  # fmt: skip
        of_merge = problem("merge", q, v, block_indices, length)
        out, lse = with_tile(
            problem("block_fwd", q, v, block_indices, length),
            lambda tile: launch(tile, table_tile(of_merge)),
            lambda tile: with_tile(of_merge, lambda merge: launch(tile, merge)),
        )
    return out, lse, slots, starts


def launch_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    document_starts: Tensor | None,
    block_indices: Tensor,
    work: Work,
    dense: dict[str, int],
    tile: Tile,
    merge: Tile,
) -> tuple[Tensor, Tensor]:
    """out and lse, chunk after chunk: partial results of its items, then the merge of its slots."""
    (B, T, H, D), DV, (J, N) = q.shape, v.shape[3], block_indices.shape[2:]
    plan, R, length = work.plan, H // J, work.length
    out = torch.empty(B, T, H, DV, dtype=v.dtype, device=q.device)
    lse = torch.empty(B, T, H, dtype=torch.float32, device=q.device)
    num_partials = plan.heads * plan.tokens * N * R
    partials = torch.empty(num_partials, DV, dtype=v.dtype, device=q.device)
    partial_lse = torch.empty(num_partials, dtype=torch.float32, device=q.device)
    for chunk in chunks_of(plan, B * J, T):
        block_fwd_kernel[(plan.items,)](
            q, k, v, document_starts,
            work.slots, work.starts, work.ends, work.item_lists, partials, partial_lse,
            T, cdiv(T, length), plan.lists, chunk.number, chunk.first_head, chunk.first_token,
            D**-0.5, **constants_of(q, v, block_indices, work), **dense,
            WIDTH=key_slice(D), PADDED_DV=padded(DV),
            BLOCK_NEAR=power_of_2(dense["LOCAL"] * length),
            ROWS=tile.rows, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        merge_kernel[(cdiv(chunk.tokens * R, merge.rows) * chunk.heads,)](
            q, k, v, document_starts, partials, partial_lse, block_indices, out, lse,
            T, chunk.first_head, chunk.first_token, chunk.tokens, D**-0.5,
            H=H, G=v.shape[2], J=J, N=N, D=D, DV=DV, LENGTH=length, **dense,
            PADDED_N=power_of_2(N), WIDTH=key_slice(D), PADDED_DV=padded(DV), ROWS=merge.rows,
            KEYS=padded(length), PRECISION=precision(),
            num_warps=merge.warps, num_stages=merge.stages,
            maxnreg=MERGE_REGISTERS if q.itemsize == 2 else None,
        )  # fmt: skip
    return out, lse


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
    delta, DV = torch.empty_like(lse), v.shape[3]
    with torch.cuda.device_of(q):
        delta_kernel[(cdiv(lse.numel(), 32),)](
            out, dout, delta, lse.numel(), DV=DV, PADDED_DV=padded(DV), ROWS=32, num_warps=4
        )
    of_out = lse, delta, slots, starts, dout
    return block_gradients(q, k, v, block_indices, *of_out, gated, length, causal)


def block_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    lse: Tensor,
    delta: Tensor,
    slots: Tensor,
    starts: Tensor,
    dout: Tensor,
    gated: bool,
    length: int,
    causal: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What attend_blocks_backward returns, for rows whose delta is known."""
    plan = plan_work(q, block_indices, length, max(q.shape[3], v.shape[3]))
    with torch.cuda.device_of(q):
        work = cut_items(slots, starts, plan, length, causal=causal)
        launch = partial(launch_backward, q, k, v, block_indices, lse, delta, dout, gated, work)
        dq, dk, dv, dgates = with_tile(problem("block_bwd", q, v, block_indices, length), launch)
    if not gated:
        return dq, dk, dv, dgates
    (B, T), (J, N) = q.shape[:2], block_indices.shape[2:]
    dgates = dgates.view(B, J, T, N).transpose(1, 2)
    return dq, dk, dv, dgates.where(block_indices >= 0, 0.0).contiguous()


def launch_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    block_indices: Tensor,
    lse: Tensor,
    delta: Tensor,
    dout: Tensor,
    gated: bool,
    work: Work,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and the gates' gradient, chunk after chunk: partial results, then their sums."""
    (B, T, H, D), DV, (J, N) = q.shape, v.shape[3], block_indices.shape[2:]
    plan, R = work.plan, H // J

    def new(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.float32, device=q.device)

    num_partials = plan.heads * plan.tokens * N * R
    partial_dq = torch.empty(num_partials, D, dtype=q.dtype, device=q.device)
    partial_dgate = new(num_partials) if gated else None
    partial_dk, partial_dv = (new(plan.shared * work.length, W) for W in (D, DV))
    dq, dk, dv = torch.empty_like(q), sums_for(k, J, plan), sums_for(v, J, plan)
    dgates = new(B * J, T, N) if gated else new(0)
    for chunk in chunks_of(plan, B * J, T):
        block_bwd_kernel[(plan.items,)](
            q, k, v, dout, lse, delta,
            work.slots, work.starts, work.ends, work.item_lists, work.shared_ends,
            partial_dq, partial_dgate, partial_dk, partial_dv, dk, dv,
            T, cdiv(T, work.length), plan.lists, chunk.number, chunk.first_head, chunk.first_token,
            D**-0.5, **constants_of(q, v, block_indices, work), GATES=gated,
            AHEAD=padded(max(D, DV)) <= 64, WIDTH=min(64, padded(D)), WIDTH_V=min(64, padded(DV)),
            ROWS=tile.rows, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
        sum_partials(chunk, work, block_indices, partial_dq, partial_dk, partial_dv, dq, dk, dv)
        if partial_dgate is not None:
            by_slot = partial_dgate.view(plan.heads, plan.tokens, N, R).sum(-1)
            of_chunk(dgates, chunk).copy_(by_slot[: chunk.heads, : chunk.tokens])
    return dq, *summed(dk, dv, k, v, J), dgates


def sum_partials(
    chunk: Chunk,
    work: Work,
    block_indices: Tensor,
    partial_dq: Tensor,
    partial_dk: Tensor,
    partial_dv: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
) -> None:
    """A chunk's dK and dV of lists of several items, and its dQ, onto dq, dk, dv."""
    (_, T, H, D), DV, (J, N) = dq.shape, dv.shape[3], block_indices.shape[2:]
    sum_items_kernel[(work.plan.lists, cdiv(work.length, 8), 2)](
        partial_dk, partial_dv, dk, dv, work.ends, work.shared_ends, T, cdiv(T, work.length),
        chunk.number, chunk.first_head, chunk.first_token,
        J=J, D=D, DV=DV, LENGTH=work.length, PADDED_D=padded(D), PADDED_DV=padded(DV),
        KEYS=8, ITEMS=8, num_warps=4,
    )  # fmt: skip
    sum_slots_kernel[(cdiv(chunk.tokens * (H // J), 32) * chunk.heads,)](
        partial_dq, block_indices, dq, T, chunk.first_head, chunk.first_token, chunk.tokens,
        H=H, J=J, N=N, D=D, PADDED_D=padded(D), ROWS=32, num_warps=4,
    )  # fmt: skip


def sums_for(x: Tensor, index_heads: int, plan: Plan) -> Tensor:
    """[B, T, J, D] to gather dK or dV in: float32 if chunks or index heads add to one another."""
    B, T, G, D = x.shape
    final = plan.runs == 1 and index_heads == G
    dtype = x.dtype if final else torch.float32
    return torch.empty(B, T, index_heads, D, dtype=dtype, device=x.device)


def of_chunk(dgates: Tensor, chunk: Chunk) -> Tensor:
    heads = dgates[chunk.first_head : chunk.first_head + chunk.heads]
    return heads[:, chunk.first_token : chunk.first_token + chunk.tokens]


def constants_of(q: Tensor, v: Tensor, block_indices: Tensor, work: Work) -> dict[str, Any]:
    """What the two large kernels are compiled for."""
    (H, D), (G, DV), (J, N) = q.shape[2:], v.shape[2:], block_indices.shape[2:]
    return dict(
        H=H, G=G, J=J, N=N, D=D, DV=DV, LENGTH=work.length, CAUSAL=work.causal,
        KEYS=padded(work.length), ITEM=work.plan.item, PRECISION=precision(),
    )  # fmt: skip


def problem(kernel: str, q: Tensor, v: Tensor, block_indices: Tensor, length: int) -> Problem:
    _, T, H, D = q.shape
    R = H // block_indices.shape[2]
    return Problem(kernel, q.dtype, D, v.shape[3], R, T, q.device, block=length)


@register_fake(attend_blocks)
def _(q, k, v, block_indices, block_gates, document_starts, length, causal, initial, local):
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
    q, k, v, block_indices, gates, _, *ctx.sizes, _, _ = inputs
    ctx.save_for_backward(q, k, v, block_indices, *output)
    ctx.gates = None if gates is None else gates.dtype
    ctx.mark_non_differentiable(*output[1:])  # lse and the lists are for the backward pass
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, _dlse, _slots, _starts):
    gated = ctx.gates is not None
    grads = attend_blocks_backward(*ctx.saved_tensors, dout.contiguous(), gated, *ctx.sizes)
    dq, dk, dv, dgates = grads
    return dq, dk, dv, None, dgates.to(ctx.gates) if gated else None, None, None, None, None, None


register_autograd(attend_blocks, _backward, setup_context=_save)
