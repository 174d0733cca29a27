"""The operations of Native Sparse Attention as the modules call them: checks, then a backend.

Each op has the signature of its namesake in `nsa.reference`, plus `backend=`, the name of an entry
of `nsa.backends.BACKENDS`. Wrong shapes, dtypes or devices raise ValueError. A module chooses its
backend once, by `nsa.backends.resolve_backend`; nothing here falls back to another one.
"""

from jaxtyping import Float, Int
from torch import Tensor

from nsa import blocks
from nsa.backends import BACKENDS, Backend, check_importance, check_option, interpreted
from nsa.config import NSAConfig
from nsa.op_checks import (
    check_alike,
    check_has_block,
    check_indices,
    check_memory,
    check_num_compressed,
    check_num_keys,
    check_queries_keys,
    check_scores,
    check_shape,
)


def _chosen(backend: str, q: Tensor) -> Backend:
    if backend == "triton" and not (q.is_cuda or interpreted()):
        raise ValueError(
            f"backend='triton' runs on CUDA devices and the tensors are on {q.device}: move them "
            f"there, or build with backend='torch'"
        )
    return BACKENDS[backend]


def block_means(
    x: Float[Tensor, "B T G D"], cfg: NSAConfig, *, backend: str = "reference"
) -> Float[Tensor, "B C G D"]:
    """See `reference.block_means`."""
    check_has_block(x, cfg)
    return _chosen(backend, x).block_means(x, cfg)


def attention_pool(
    x: Float[Tensor, "B T G D"],
    to_scores: Float[Tensor, "D D"],
    position_scores: Float[Tensor, "l D"],
    positions: Float[Tensor, "G l D"] | None,
    cfg: NSAConfig,
    *,
    backend: str = "reference",
) -> Float[Tensor, "B C G D"]:
    """See `reference.attention_pool`."""
    check_has_block(x, cfg)
    (G, D), size = x.shape[2:], cfg.compress_block_size
    check_shape("to_scores", to_scores, (D, D))
    check_shape("position_scores", position_scores, (size, D))
    if positions is not None:
        check_shape("positions", positions, (G, size, D))
    return _chosen(backend, x).attention_pool(x, to_scores, position_scores, positions, cfg)


def compressed_attention(
    q: Float[Tensor, "B T H D"],
    k_cmp: Float[Tensor, "B C G D"],
    v_cmp: Float[Tensor, "B C G Dv"],
    cfg: NSAConfig,
    mem_k: Float[Tensor, "G Nm D"] | None = None,
    mem_v: Float[Tensor, "G Nm Dv"] | None = None,
    *,
    document_starts: blocks.Starts = None,
    backend: str = "reference",
) -> tuple[Float[Tensor, "B T H Dv"], Float[Tensor, "B T H"]]:
    """See `reference.compressed_attention`."""
    check_queries_keys(q, k_cmp, v_cmp)
    check_num_compressed(q, k_cmp, cfg)
    check_memory(q, k_cmp, v_cmp, mem_k, mem_v)
    told = _documents(document_starts, q, cfg, backend)
    return _chosen(backend, q).compressed_attention(q, k_cmp, v_cmp, cfg, mem_k, mem_v, **told)


def select_blocks(
    q: Float[Tensor, "B T H D"],
    k_cmp: Float[Tensor, "B C G D"],
    lse: Float[Tensor, "B T H"],
    cfg: NSAConfig,
    shared: bool = True,
    *,
    document_starts: blocks.Starts = None,
    backend: str = "reference",
) -> Int[Tensor, "B T J N"]:
    """See `reference.select_blocks`."""
    check_scores(q, k_cmp, lse, cfg)
    check_importance(backend, cfg.importance)
    told = _documents(document_starts, q, cfg, backend)
    return _chosen(backend, q).select_blocks(q, k_cmp, lse, cfg, shared, **told)


def selected_importance(
    q: Float[Tensor, "B T H D"],
    k_cmp: Float[Tensor, "B C G D"],
    lse: Float[Tensor, "B T H"],
    block_indices: Int[Tensor, "B T J N"],
    cfg: NSAConfig,
    mem_k: Float[Tensor, "G Nm D"] | None = None,
    *,
    document_starts: blocks.Starts = None,
    backend: str = "reference",
) -> Float[Tensor, "B T J N"]:
    """See `reference.selected_importance`."""
    check_scores(q, k_cmp, lse, cfg)
    check_memory(q, k_cmp, k_cmp, mem_k, mem_k)
    check_indices(block_indices, q, k_cmp)
    check_importance(backend, cfg.importance)
    told = _documents(document_starts, q, cfg, backend)
    return _chosen(backend, q).selected_importance(q, k_cmp, lse, block_indices, cfg, mem_k, **told)


def selected_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T G D"],
    v: Float[Tensor, "B T G Dv"],
    block_indices: Int[Tensor, "B T J N"],
    cfg: NSAConfig,
    block_gates: Float[Tensor, "B T J N"] | None = None,
    *,
    document_starts: blocks.Starts = None,
    backend: str = "reference",
) -> Float[Tensor, "B T H Dv"]:
    """See `reference.selected_attention`."""
    check_queries_keys(q, k, v)
    check_num_keys(q, k)
    check_indices(block_indices, q, k)
    if block_gates is not None:
        check_shape("block_gates", block_gates, tuple(block_indices.shape))
    told = _documents(document_starts, q, cfg, backend)
    return _chosen(backend, q).selected_attention(q, k, v, block_indices, cfg, block_gates, **told)


def sliding_window_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T G D"],
    v: Float[Tensor, "B T G Dv"],
    cfg: NSAConfig,
    *,
    document_starts: blocks.Starts = None,
    backend: str = "reference",
) -> Float[Tensor, "B T H Dv"]:
    """See `reference.sliding_window_attention`."""
    check_queries_keys(q, k, v)
    check_num_keys(q, k)
    told = _documents(document_starts, q, cfg, backend)
    return _chosen(backend, q).sliding_window_attention(q, k, v, cfg, **told)


def combine(
    gates: Float[Tensor, "B T H 3"],
    compressed: Float[Tensor, "B T H Dv"],
    selected: Float[Tensor, "B T H Dv"],
    sliding: Float[Tensor, "B T H Dv"],
    *,
    backend: str = "reference",
) -> Float[Tensor, "B T H Dv"]:
    """See `reference.combine`."""
    check_shape("gates", gates, (*compressed.shape[:3], 3))
    check_shape("selected", selected, tuple(compressed.shape))
    check_shape("sliding", sliding, tuple(compressed.shape))
    return _chosen(backend, gates).combine(gates, compressed, selected, sliding)


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
    document_starts: blocks.Starts = None,
    backend: str,
) -> Float[Tensor, "B T H Dv"]:
    """See `kernels.gated_attention`; a backend may lack it."""
    attend = _chosen(backend, q).gated_attention
    if attend is None:
        raise ValueError(f"backend={backend!r} has no gated_attention: use its ops one by one")
    check_queries_keys(q, k_cmp, v_cmp)
    check_num_compressed(q, k_cmp, cfg)
    check_memory(q, k_cmp, v_cmp, mem_k, mem_v)
    check_alike(q, q_rot=q_rot, compressed=compressed)
    check_shape("q_rot", q_rot, tuple(q.shape))
    for name, k, v in (("slc", k_slc, v_slc), ("win", k_win, v_win)):
        check_queries_keys(q_rot, k, v)
        check_num_keys(q, k)
        check_shape(f"v_{name}", v, (*k.shape[:3], v_cmp.shape[3]))
    check_indices(block_indices, q, k_slc)
    check_shape("gates", gates, (*q.shape[:3], 3))
    check_shape("compressed", compressed, (*q.shape[:3], v_cmp.shape[3]))
    check_shape("lse", lse, tuple(q.shape[:3]))
    rotated = q_rot, k_slc, v_slc, block_indices, k_win, v_win
    told = _documents(document_starts, q, cfg, backend)
    return attend(gates, q, k_cmp, v_cmp, compressed, lse, *rotated, cfg, mem_k, mem_v, **told)


def rotate(
    x: Float[Tensor, "B T H D"], angles: Float[Tensor, "*B T half"], *, backend: str = "reference"
) -> Float[Tensor, "B T H D"]:
    """See `reference.rotate`. Angles are the same for all rows of a batch, or each row's own."""
    rows = x.shape[:1] if angles.ndim == 3 else ()
    check_shape("angles", angles, (*rows, x.shape[1], x.shape[3] // 2))
    return _chosen(backend, x).rotate(x, angles)


def _documents(
    document_starts: blocks.Starts, q: Tensor, cfg: NSAConfig, backend: str
) -> dict[str, Tensor]:
    """What an op is told of documents: nothing, if there are none. Layers check their values."""
    if document_starts is None:
        return {}
    check_option(backend, "document_starts")
    if not cfg.causal:
        raise ValueError(
            "document_starts with causal=False: documents that share a row need causal=True"
        )
    check_shape("document_starts", document_starts, tuple(q.shape[:2]))
    return {"document_starts": document_starts}
