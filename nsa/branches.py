"""From projected heads to the gated sum of the three branches (eq. 5), on any backend.

The only place that knows the order of the ops. Letters as in `nsa.reference`.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa import ops
from nsa.backends import BACKENDS
from nsa.config import NSAConfig
from nsa.heads import Branches, Projected


def gated_attention(
    x: Projected,
    cfg: NSAConfig,
    *,
    backend: str,
    shared: bool = True,
    use_diff_topk: bool = False,
    compressed_output: bool = True,
    block_indices: Int[Tensor, "B T J N"] | None = None,
) -> Float[Tensor, "B T H D"]:
    """The gated sum, in one op with one backward pass for all branches where the backend has one.

    Args:
        shared: one selection for all query heads of a key/value head.
        use_diff_topk, compressed_output: see `SparseAttention`; such layers take the ops one by
            one on every backend.
        block_indices: the selected blocks, if they are known; None selects them.
    """
    told = {"document_starts": x.document_starts, "backend": backend}
    plain = compressed_output and cfg.num_selected_blocks and not use_diff_topk
    if not plain or BACKENDS[backend].gated_attention is None:
        *branches, gates, _ = attend_branches(
            x, cfg, backend=backend, shared=shared, use_diff_topk=use_diff_topk,
            compressed_output=compressed_output, block_indices=block_indices,
        )  # fmt: skip
        return ops.combine(gates, *branches, backend=backend)
    q, k_cmp, v_cmp = x.q.detach(), x.k_cmp.detach(), x.v_cmp.detach()
    memory = (None if mem is None else mem.detach() for mem in (x.mem_k, x.mem_v))
    compressed, lse = ops.compressed_attention(q, k_cmp, v_cmp, cfg, *memory, **told)
    if block_indices is None:
        block_indices = ops.select_blocks(q, k_cmp, lse, cfg, shared, **told)
    return ops.gated_attention(
        x.gates, x.q, x.k_cmp, x.v_cmp, compressed, lse,
        x.q_rot, x.k_slc, x.v_slc, block_indices, x.k_win, x.v_win,
        cfg, x.mem_k, x.mem_v, **told,
    )  # fmt: skip


def attend_branches(
    x: Projected,
    cfg: NSAConfig,
    *,
    backend: str,
    shared: bool = True,
    use_diff_topk: bool = False,
    compressed_output: bool = True,
    block_indices: Int[Tensor, "B T J N"] | None = None,
) -> Branches:
    """The branches one by one; arguments as in `gated_attention`."""
    told = {"document_starts": x.document_starts, "backend": backend}
    compressed, lse = ops.compressed_attention(x.q, x.k_cmp, x.v_cmp, cfg, x.mem_k, x.mem_v, **told)
    if not compressed_output:
        compressed = torch.zeros_like(x.q)
    if block_indices is None:
        block_indices = ops.select_blocks(x.q, x.k_cmp, lse, cfg, shared, **told)
    selected = torch.zeros_like(x.q)
    if cfg.num_selected_blocks:
        block_gates = None
        if use_diff_topk:
            block_gates = straight_through_gates(x, lse, block_indices, cfg, backend=backend)
        selected = ops.selected_attention(
            x.q_rot, x.k_slc, x.v_slc, block_indices, cfg, block_gates, **told
        )
    sliding = ops.sliding_window_attention(x.q_rot, x.k_win, x.v_win, cfg, **told)
    return Branches(compressed, selected, sliding, x.gates, block_indices)


def straight_through_gates(
    x: Projected,
    lse: Float[Tensor, "B T H"],
    block_indices: Int[Tensor, "B T J N"],
    cfg: NSAConfig,
    *,
    backend: str,
) -> Float[Tensor, "B T J N"]:
    """Ones whose gradient is that of the selected blocks' importances, for `use_diff_topk`."""
    chosen = ops.selected_importance(
        x.q, x.k_cmp, lse, block_indices, cfg, x.mem_k,
        document_starts=x.document_starts, backend=backend,
    )  # fmt: skip
    return 1.0 + (chosen - chosen.detach())
