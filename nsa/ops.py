"""The operations of Native Sparse Attention as the modules call them: checks, then a backend.

Each op has the signature of its namesake in `nsa.reference`, plus `backend=`, the name of an entry
of `nsa.backends.BACKENDS`. Wrong shapes, dtypes or devices raise ValueError. A module chooses its
backend once, by `nsa.backends.resolve_backend`; nothing here falls back to another one.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from nsa import blocks
from nsa.backends import BACKENDS, Backend, check_importance, interpreted
from nsa.config import NSAConfig


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
    _check_has_block(x, cfg)
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
    _check_has_block(x, cfg)
    (G, D), size = x.shape[2:], cfg.compress_block_size
    _check_shape("to_scores", to_scores, (D, D))
    _check_shape("position_scores", position_scores, (size, D))
    if positions is not None:
        _check_shape("positions", positions, (G, size, D))
    return _chosen(backend, x).attention_pool(x, to_scores, position_scores, positions, cfg)


def compressed_attention(
    q: Float[Tensor, "B T H D"],
    k_cmp: Float[Tensor, "B C G D"],
    v_cmp: Float[Tensor, "B C G Dv"],
    cfg: NSAConfig,
    mem_k: Float[Tensor, "G Nm D"] | None = None,
    mem_v: Float[Tensor, "G Nm Dv"] | None = None,
    *,
    backend: str = "reference",
) -> tuple[Float[Tensor, "B T H Dv"], Float[Tensor, "B T H"]]:
    """See `reference.compressed_attention`."""
    _check_queries_keys(q, k_cmp, v_cmp)
    _check_num_compressed(q, k_cmp, cfg)
    _check_memory(q, k_cmp, v_cmp, mem_k, mem_v)
    return _chosen(backend, q).compressed_attention(q, k_cmp, v_cmp, cfg, mem_k, mem_v)


def select_blocks(
    q: Float[Tensor, "B T H D"],
    k_cmp: Float[Tensor, "B C G D"],
    lse: Float[Tensor, "B T H"],
    cfg: NSAConfig,
    shared: bool = True,
    *,
    backend: str = "reference",
) -> Int[Tensor, "B T J N"]:
    """See `reference.select_blocks`."""
    _check_scores(q, k_cmp, lse, cfg)
    check_importance(backend, cfg.importance)
    return _chosen(backend, q).select_blocks(q, k_cmp, lse, cfg, shared)


def selected_importance(
    q: Float[Tensor, "B T H D"],
    k_cmp: Float[Tensor, "B C G D"],
    lse: Float[Tensor, "B T H"],
    block_indices: Int[Tensor, "B T J N"],
    cfg: NSAConfig,
    mem_k: Float[Tensor, "G Nm D"] | None = None,
    *,
    backend: str = "reference",
) -> Float[Tensor, "B T J N"]:
    """See `reference.selected_importance`."""
    _check_scores(q, k_cmp, lse, cfg)
    _check_memory(q, k_cmp, k_cmp, mem_k, mem_k)
    _check_indices(block_indices, q, k_cmp)
    check_importance(backend, cfg.importance)
    return _chosen(backend, q).selected_importance(q, k_cmp, lse, block_indices, cfg, mem_k)


def selected_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T G D"],
    v: Float[Tensor, "B T G Dv"],
    block_indices: Int[Tensor, "B T J N"],
    cfg: NSAConfig,
    block_gates: Float[Tensor, "B T J N"] | None = None,
    *,
    backend: str = "reference",
) -> Float[Tensor, "B T H Dv"]:
    """See `reference.selected_attention`."""
    _check_queries_keys(q, k, v)
    _check_num_keys(q, k)
    _check_indices(block_indices, q, k)
    if block_gates is not None:
        _check_shape("block_gates", block_gates, tuple(block_indices.shape))
    return _chosen(backend, q).selected_attention(q, k, v, block_indices, cfg, block_gates)


def sliding_window_attention(
    q: Float[Tensor, "B T H D"],
    k: Float[Tensor, "B T G D"],
    v: Float[Tensor, "B T G Dv"],
    cfg: NSAConfig,
    *,
    backend: str = "reference",
) -> Float[Tensor, "B T H Dv"]:
    """See `reference.sliding_window_attention`."""
    _check_queries_keys(q, k, v)
    _check_num_keys(q, k)
    return _chosen(backend, q).sliding_window_attention(q, k, v, cfg)


def combine(
    gates: Float[Tensor, "B T H 3"],
    compressed: Float[Tensor, "B T H Dv"],
    selected: Float[Tensor, "B T H Dv"],
    sliding: Float[Tensor, "B T H Dv"],
    *,
    backend: str = "reference",
) -> Float[Tensor, "B T H Dv"]:
    """See `reference.combine`."""
    _check_shape("gates", gates, (*compressed.shape[:3], 3))
    _check_shape("selected", selected, tuple(compressed.shape))
    _check_shape("sliding", sliding, tuple(compressed.shape))
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
    backend: str,
) -> Float[Tensor, "B T H Dv"]:
    """See `kernels.gated_attention`; a backend may lack it."""
    attend = _chosen(backend, q).gated_attention
    if attend is None:
        raise ValueError(f"backend={backend!r} has no gated_attention: use its ops one by one")
    _check_queries_keys(q, k_cmp, v_cmp)
    _check_num_compressed(q, k_cmp, cfg)
    _check_memory(q, k_cmp, v_cmp, mem_k, mem_v)
    _check_alike(q, q_rot=q_rot, compressed=compressed)
    _check_shape("q_rot", q_rot, tuple(q.shape))
    for name, k, v in (("slc", k_slc, v_slc), ("win", k_win, v_win)):
        _check_queries_keys(q_rot, k, v)
        _check_num_keys(q, k)
        _check_shape(f"v_{name}", v, (*k.shape[:3], v_cmp.shape[3]))
    _check_indices(block_indices, q, k_slc)
    _check_shape("gates", gates, (*q.shape[:3], 3))
    _check_shape("compressed", compressed, (*q.shape[:3], v_cmp.shape[3]))
    _check_shape("lse", lse, tuple(q.shape[:3]))
    rotated = q_rot, k_slc, v_slc, block_indices, k_win, v_win
    return attend(gates, q, k_cmp, v_cmp, compressed, lse, *rotated, cfg, mem_k, mem_v)


def rotate(
    x: Float[Tensor, "B T H D"], angles: Float[Tensor, "T half"], *, backend: str = "reference"
) -> Float[Tensor, "B T H D"]:
    """See `reference.rotate`."""
    _check_shape("angles", angles, (x.shape[1], x.shape[3] // 2))
    return _chosen(backend, x).rotate(x, angles)


def _check_has_block(x: Tensor, cfg: NSAConfig) -> None:
    if x.shape[1] < cfg.compress_block_size:
        raise ValueError(
            f"{x.shape[1]} tokens have no block of compress_block_size={cfg.compress_block_size}: "
            "pad them to one"
        )


def _check_shape(name: str, x: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(x.shape) != wanted:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be {wanted}")


def _check_alike(q: Tensor, **others: Tensor) -> None:
    for name, x in others.items():
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}: "
                f"they must agree"
            )


def _check_queries_keys(q: Tensor, k: Tensor, v: Tensor) -> None:
    _check_alike(q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be [B, T, heads, D]")
    _check_shape("k", k, (q.shape[0], *k.shape[1:3], q.shape[3]))
    _check_shape("v", v, (*k.shape[:3], v.shape[3]))
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads and k {k.shape[2]}: query heads must be a multiple of "
            f"key/value heads"
        )


def _check_memory(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, mem_k: Tensor | None, mem_v: Tensor | None
) -> None:
    if (mem_k is None) != (mem_v is None):
        raise ValueError("mem_k and mem_v come together: pass both or neither")
    if mem_k is not None and mem_v is not None:
        _check_alike(q, mem_k=mem_k, mem_v=mem_v)
        wanted = (k_cmp.shape[2], mem_k.shape[1], k_cmp.shape[3])
        _check_shape("mem_k", mem_k, wanted)
        _check_shape("mem_v", mem_v, (*wanted[:2], v_cmp.shape[3]))


def _check_indices(block_indices: Tensor, q: Tensor, k: Tensor) -> None:
    heads, groups = q.shape[2], k.shape[2]
    if block_indices.dtype != torch.int32:
        raise ValueError(f"block_indices has dtype {block_indices.dtype}: it must be torch.int32")
    if block_indices.ndim != 4 or block_indices.shape[2] not in (groups, heads):
        raise ValueError(
            f"block_indices has shape {tuple(block_indices.shape)}: it must be [B, T, G, N] with "
            f"G={groups} key/value heads, or [B, T, H, N] with H={heads} query heads"
        )
    _check_shape("block_indices", block_indices, (*q.shape[:2], *block_indices.shape[2:]))


def _check_num_keys(q: Tensor, k: Tensor) -> None:
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k has {k.shape[1]} tokens and q {q.shape[1]}: they must be the same")


def _check_num_compressed(q: Tensor, k_cmp: Tensor, cfg: NSAConfig) -> None:
    wanted = blocks.num_compress_blocks(q.shape[1], cfg)
    if k_cmp.shape[1] != wanted:
        raise ValueError(
            f"k_cmp has {k_cmp.shape[1]} compressed blocks: {q.shape[1]} tokens make {wanted} with "
            f"compress_block_size={cfg.compress_block_size} and "
            f"compress_block_sliding_stride={cfg.compress_block_sliding_stride}"
        )


def _check_scores(q: Tensor, k_cmp: Tensor, lse: Tensor, cfg: NSAConfig) -> None:
    _check_queries_keys(q, k_cmp, k_cmp)
    _check_num_compressed(q, k_cmp, cfg)
    _check_shape("lse", lse, tuple(q.shape[:3]))
