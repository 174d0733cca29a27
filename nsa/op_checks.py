"""What `nsa.ops` asks of tensors: shapes, dtypes and devices that agree.

Each function raises ValueError, in the caller's words, where something does not.
"""

import torch
from torch import Tensor

from nsa import blocks
from nsa.config import NSAConfig


def check_has_block(x: Tensor, cfg: NSAConfig) -> None:
    if x.shape[1] < cfg.compress_block_size:
        raise ValueError(
            f"{x.shape[1]} tokens have no block of compress_block_size={cfg.compress_block_size}: "
            "pad them to one"
        )


def check_shape(name: str, x: Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(x.shape) != wanted:
        raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be {wanted}")


def check_alike(q: Tensor, **others: Tensor) -> None:
    for name, x in others.items():
        if x.dtype != q.dtype or x.device != q.device:
            raise ValueError(
                f"{name} is {x.dtype} on {x.device} but q is {q.dtype} on {q.device}: "
                f"they must agree"
            )


def check_queries_keys(q: Tensor, k: Tensor, v: Tensor) -> None:
    check_alike(q, k=k, v=v)
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x.ndim != 4:
            raise ValueError(f"{name} has shape {tuple(x.shape)}: it must be [B, T, heads, D]")
    check_shape("k", k, (q.shape[0], *k.shape[1:3], q.shape[3]))
    check_shape("v", v, (*k.shape[:3], v.shape[3]))
    if q.shape[2] % k.shape[2]:
        raise ValueError(
            f"q has {q.shape[2]} heads and k {k.shape[2]}: query heads must be a multiple of "
            f"key/value heads"
        )


def check_memory(
    q: Tensor, k_cmp: Tensor, v_cmp: Tensor, mem_k: Tensor | None, mem_v: Tensor | None
) -> None:
    if (mem_k is None) != (mem_v is None):
        raise ValueError("mem_k and mem_v come together: pass both or neither")
    if mem_k is not None and mem_v is not None:
        check_alike(q, mem_k=mem_k, mem_v=mem_v)
        wanted = (k_cmp.shape[2], mem_k.shape[1], k_cmp.shape[3])
        check_shape("mem_k", mem_k, wanted)
        check_shape("mem_v", mem_v, (*wanted[:2], v_cmp.shape[3]))


def check_indices(block_indices: Tensor, q: Tensor, k: Tensor) -> None:
    heads, groups = q.shape[2], k.shape[2]
    if block_indices.dtype != torch.int32:
        raise ValueError(f"block_indices has dtype {block_indices.dtype}: it must be torch.int32")
    if block_indices.ndim != 4 or block_indices.shape[2] not in (groups, heads):
        raise ValueError(
            f"block_indices has shape {tuple(block_indices.shape)}: it must be [B, T, G, N] with "
            f"G={groups} key/value heads, or [B, T, H, N] with H={heads} query heads"
        )
    check_shape("block_indices", block_indices, (*q.shape[:2], *block_indices.shape[2:]))


def check_num_keys(q: Tensor, k: Tensor) -> None:
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"k has {k.shape[1]} tokens and q {q.shape[1]}: they must be the same")


def check_num_compressed(q: Tensor, k_cmp: Tensor, cfg: NSAConfig) -> None:
    wanted = blocks.num_compress_blocks(q.shape[1], cfg)
    if k_cmp.shape[1] != wanted:
        raise ValueError(
            f"k_cmp has {k_cmp.shape[1]} compressed blocks: {q.shape[1]} tokens make {wanted} with "
            f"compress_block_size={cfg.compress_block_size} and "
            f"compress_block_sliding_stride={cfg.compress_block_sliding_stride}"
        )


def check_scores(q: Tensor, k_cmp: Tensor, lse: Tensor, cfg: NSAConfig) -> None:
    check_queries_keys(q, k_cmp, k_cmp)
    check_num_compressed(q, k_cmp, cfg)
    check_shape("lse", lse, tuple(q.shape[:3]))
